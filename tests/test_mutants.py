"""The deliberate defects of `mutants.py` fit the package and the tests; run that to see whether they are caught."""

import mutants
import pytest

PACKAGE = mutants.ROOT / "funcbilevel"


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_a_mutant_fits_the_package(mutant):
    assert (PACKAGE / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.old
    for test in mutant.tests:
        file, _, name = test.partition("::")
        source = (mutants.ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in source


def test_mutants_have_names_of_their_own():
    assert len({m.name for m in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 20
