"""Old name of `data`. To be deleted."""

from funcbilevel.tasks.data.adult import CATEGORIES as ADULT_CATEGORIES
from funcbilevel.tasks.data.adult import CLASSES as ADULT_CLASSES
from funcbilevel.tasks.data.adult import NUMBERS as ADULT_NUMBERS
from funcbilevel.tasks.data.adult import VARIABLE as ADULT_VARIABLE
from funcbilevel.tasks.data.adult import load as adult
from funcbilevel.tasks.data.adult import read as read_adult
from funcbilevel.tasks.data.dataset import Batch, Dataset, Graph, scaler, split
from funcbilevel.tasks.data.fetch import fetch
from funcbilevel.tasks.data.health import VARIABLE as HEALTH_VARIABLE
from funcbilevel.tasks.data.health import load as health
from funcbilevel.tasks.data.nba import VARIABLE as NBA_VARIABLE
from funcbilevel.tasks.data.nba import load as nba
from funcbilevel.tasks.data.nba import normalised
from funcbilevel.tasks.data.synthetic import load as synthetic

__all__ = [
    "ADULT_CATEGORIES",
    "ADULT_CLASSES",
    "ADULT_NUMBERS",
    "ADULT_VARIABLE",
    "HEALTH_VARIABLE",
    "NBA_VARIABLE",
    "Batch",
    "Dataset",
    "Graph",
    "adult",
    "fetch",
    "health",
    "nba",
    "normalised",
    "read_adult",
    "scaler",
    "split",
    "synthetic",
]
