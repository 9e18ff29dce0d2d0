"""Old name of `data.dsprites` and `data.dsprites_floors`. To be deleted."""

from funcbilevel.tasks.data.dsprites import (
    IMAGES_VARIABLE,
    MATRIX_VARIABLE,
    URL,
    Clean,
    Data,
    Hearts,
    download,
    generate,
    hearts,
    images,
    load_hearts,
    outcome_matrix,
    render_hearts,
    structural,
    test_set,
    validation,
)
from funcbilevel.tasks.data.dsprites_floors import kernel_iv, least_squares_floor, two_stage_floor

__all__ = [
    "IMAGES_VARIABLE",
    "MATRIX_VARIABLE",
    "URL",
    "Clean",
    "Data",
    "Hearts",
    "download",
    "generate",
    "hearts",
    "images",
    "kernel_iv",
    "least_squares_floor",
    "load_hearts",
    "outcome_matrix",
    "render_hearts",
    "structural",
    "test_set",
    "two_stage_floor",
    "validation",
]
