"""Implicit layers beside JAXopt's, where it is installed: the extra `peers`."""

import implicit_layers
import jax
import pytest


@pytest.mark.parametrize("name", implicit_layers.LAYERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_gradient_is_that_of_jaxopt(x64, name):
    pytest.importorskip("jaxopt")
    layer = implicit_layers.LAYERS[name]()
    with jax.numpy_rank_promotion("allow"):
        ours, theirs = (
            jax.jit(make(layer))(layer.omega, layer.data) for make in (implicit_layers.ours, implicit_layers.jaxopt)
        )
    assert implicit_layers.error(ours, theirs) <= 1e-6


def test_report():
    def record(layer, library, seconds, difference):
        metrics = {"seconds": seconds, "compile_seconds": 2 * seconds, "difference": difference}
        return {"method": library, "settings": {"layer": layer}, "metrics": metrics}

    text = implicit_layers.report(
        [
            record(layer, *row)
            for layer in ("ridge", "lasso")
            for row in (("funcbilevel", 2.0, 0.0), ("jaxopt", 3.0, 1e-9))
        ]
    )
    assert "| ridge | jaxopt | 1.0e-09 | 1.50 | 1.50 |" in text
    assert "jaxopt: median time over ours 1.50, from 1.50 to 1.50, 2 layers." in text
