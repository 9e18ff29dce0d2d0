"""One table of methods per task: command line, help, colours, selection and report derive from it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.words import did_you_mean

GREY = "0.55"


class Method(NamedTuple):
    """A method of a task.

    Attributes:
        name: as in records and on the command line.
        help: what it is, in a few words.
        build: makes what trains it, an estimator for example, from whatever the task passes; None for what is only
            recorded.
        trials: hyper-parameters between which validation decides; as many for each method of a comparison.
        chosen: the place among the trials of those that it chose, and that are used by default.
        colour: in figures.
        label: the name in tables and figures, if it is another.
        always: it is run beside the others in any case, and is no value of --method or --methods.
        aliases: other names on the command line.
        published: hyper-parameters of its publication, if they are no trial and used by default all the same.
    """

    name: str
    help: str = ""
    build: Callable[..., Any] | None = None
    trials: tuple[Mapping[str, Any], ...] = ({},)
    chosen: int = 0
    colour: str = GREY
    label: str = ""
    always: bool = False
    aliases: tuple[str, ...] = ()
    published: Mapping[str, Any] | None = None

    @property
    def hyper(self) -> Mapping[str, Any]:
        """The hyper-parameters that are used by default."""
        return self.trials[self.chosen] if self.published is None else self.published


Methods: TypeAlias = Mapping[str, Method]


def table(*methods: Method) -> dict[str, Method]:
    """The methods by name, in the order of tables and figures."""
    by_name = {method.name: method for method in methods}
    if len(by_name) < len(methods):
        raise ValueError(f"table: a name stands twice among {', '.join(method.name for method in methods)}.")
    return by_name


def find(methods: Methods, name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {name!r}.")
    return methods[name]


def choices(methods: Methods) -> tuple[str, ...]:
    """The names that the command line takes."""
    return tuple(name for name, method in methods.items() if not method.always)


def resolve(option: str, methods: Methods, name: str) -> str:
    """The name that a value of the command line stands for.

    Raises:
        UserError: there is no such method.
    """
    aliases = {alias: method.name for method in methods.values() for alias in method.aliases}
    name = aliases.get(name, name)
    if name not in choices(methods):
        raise UserError(
            f"{option} must be among {', '.join(choices(methods))}, got {name}{did_you_mean(name, choices(methods))}"
        )
    return name


def resolve_all(option: str, methods: Methods, names: Iterable[str]) -> tuple[str, ...]:
    """The same for an option that takes several.

    Raises:
        UserError: one is unknown, one is given twice, or there is none.
    """
    given = tuple(names)
    if not given:
        raise UserError(f"{option} must be among {', '.join(choices(methods))}, got none.")
    resolved = tuple(resolve(option, methods, name) for name in given)
    if len(set(resolved)) < len(resolved):
        raise UserError(f"{option} must name each method once, got {', '.join(given)}.")
    return resolved


def description(methods: Methods) -> str:
    """The methods that the command line takes, for its help."""
    return "; ".join(
        f"{name}{' (or ' + ', '.join(methods[name].aliases) + ')' if methods[name].aliases else ''}: "
        f"{methods[name].help}"
        for name in choices(methods)
    )


def in_order(methods: Methods, names: Iterable[str]) -> list[str]:
    """The names each once, in the table's order; behind them those that it does not know, by the alphabet."""
    there = set(names)
    return [*(name for name in methods if name in there), *sorted(there - methods.keys())]


def colour(methods: Methods, name: str) -> str:
    """The method's colour; grey for one that the table does not know."""
    return methods[name].colour if name in methods else GREY


def label(methods: Methods, name: str) -> str:
    """The method's name in tables and figures."""
    return (methods[name].label if name in methods else "") or name
