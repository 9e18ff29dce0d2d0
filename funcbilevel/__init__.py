"""Functional bilevel optimization in JAX."""

from funcbilevel._argmin import argmin as argmin
from funcbilevel._bilevel import BilevelSolver as BilevelSolver
from funcbilevel._bilevel import BilevelState as BilevelState
from funcbilevel._bilevel import bilevel as bilevel
from funcbilevel._bilevel import hypergradient as hypergradient
from funcbilevel._certify import CheckedEstimator as CheckedEstimator
from funcbilevel._certify import HypergradientCheck as HypergradientCheck
from funcbilevel._certify import check_hypergradient as check_hypergradient
from funcbilevel._checkpoint import Checkpoint as Checkpoint
from funcbilevel._checkpoint import CheckpointError as CheckpointError
from funcbilevel._cost import Cost as Cost
from funcbilevel._cost import CostTable as CostTable
from funcbilevel._cost import compare_costs as compare_costs
from funcbilevel._cost import cost as cost
from funcbilevel._cost import measure_costs as measure_costs
from funcbilevel._diagnose import Diagnosis as Diagnosis
from funcbilevel._diagnose import Finding as Finding
from funcbilevel._diagnose import diagnose as diagnose
from funcbilevel._draws import FiniteSum as FiniteSum
from funcbilevel._draws import Minibatches as Minibatches
from funcbilevel._draws import Sampler as Sampler
from funcbilevel._draws import finite_sum as finite_sum
from funcbilevel._error import HypergradientError as HypergradientError
from funcbilevel._error import hypergradient_error as hypergradient_error
from funcbilevel._estimator import Adjoint as Adjoint
from funcbilevel._estimator import AdjointSystem as AdjointSystem
from funcbilevel._estimator import Estimator as Estimator
from funcbilevel._estimator import Hypergradient as Hypergradient
from funcbilevel._estimator import InnerSolution as InnerSolution
from funcbilevel._estimators.aid import aid as aid
from funcbilevel._estimators.alternating import alternating as alternating
from funcbilevel._estimators.darts import darts as darts
from funcbilevel._estimators.evolution_strategy import evolution_strategy as evolution_strategy
from funcbilevel._estimators.funcid import funcid as funcid
from funcbilevel._estimators.gradient_penalty import gradient_penalty as gradient_penalty
from funcbilevel._estimators.itd import itd as itd
from funcbilevel._estimators.kernel_adjoint import kernel_adjoint as kernel_adjoint
from funcbilevel._estimators.learned_adjoint import learned_adjoint as learned_adjoint
from funcbilevel._estimators.linear_adjoint import linear_adjoint as linear_adjoint
from funcbilevel._estimators.pointwise_adjoint import pointwise_adjoint as pointwise_adjoint
from funcbilevel._estimators.prox_aid import prox_aid as prox_aid
from funcbilevel._estimators.pzobo import pzobo as pzobo
from funcbilevel._estimators.value_penalty import value_penalty as value_penalty
from funcbilevel._fit import FitState as FitState
from funcbilevel._followers import followers as followers
from funcbilevel._hosts import ProcessError as ProcessError
from funcbilevel._implicit import custom_fixed_point as custom_fixed_point
from funcbilevel._implicit import custom_root as custom_root
from funcbilevel._implicit import kkt_conditions as kkt_conditions
from funcbilevel._kernel_model import kernel_model as kernel_model
from funcbilevel._kernels import Kernel as Kernel
from funcbilevel._kernels import gaussian_kernel as gaussian_kernel
from funcbilevel._kernels import linear_kernel as linear_kernel
from funcbilevel._kernels import matern_kernel as matern_kernel
from funcbilevel._linear_solvers import LinearSolver as LinearSolver
from funcbilevel._linear_solvers import cg as cg
from funcbilevel._linear_solvers import from_lineax as from_lineax
from funcbilevel._linear_solvers import gmres as gmres
from funcbilevel._linear_solvers import gradient_descent as gradient_descent
from funcbilevel._linear_solvers import identity as identity
from funcbilevel._linear_solvers import neumann as neumann
from funcbilevel._linear_solvers import normal_cg as normal_cg
from funcbilevel._linear_solvers import nystrom_cg as nystrom_cg
from funcbilevel._log import log_jsonl as log_jsonl
from funcbilevel._log import log_tensorboard as log_tensorboard
from funcbilevel._methods import Method as Method
from funcbilevel._methods import MethodTable as MethodTable
from funcbilevel._methods import methods as methods
from funcbilevel._microbatches import microbatched as microbatched
from funcbilevel._microbatches import microbatched_objective as microbatched_objective
from funcbilevel._model import FrozenState as FrozenState
from funcbilevel._model import LinearHead as LinearHead
from funcbilevel._model import Model as Model
from funcbilevel._model import from_function as from_function
from funcbilevel._model import from_linen as from_linen
from funcbilevel._model import from_nnx as from_nnx
from funcbilevel._partition import Partition as Partition
from funcbilevel._partition import partition as partition
from funcbilevel._precision import mixed_precision as mixed_precision
from funcbilevel._predictor import Predictor as Predictor
from funcbilevel._predictor import parametrize as parametrize
from funcbilevel._predictor import predictor as predictor
from funcbilevel._problem import FunctionalProblem as FunctionalProblem
from funcbilevel._problem import ParametricProblem as ParametricProblem
from funcbilevel._prox import projection_affine as projection_affine
from funcbilevel._prox import prox_group_lasso as prox_group_lasso
from funcbilevel._prox import prox_l1 as prox_l1
from funcbilevel._prox import proximal as proximal
from funcbilevel._recovery import Rollback as Rollback
from funcbilevel._sharding import data_parallel as data_parallel
from funcbilevel._sharding import fully_sharded as fully_sharded
from funcbilevel._state import state_from_arrays as state_from_arrays
from funcbilevel._state import state_to_arrays as state_to_arrays
from funcbilevel._stochastic.amigo import amigo as amigo
from funcbilevel._stochastic.bome import bome as bome
from funcbilevel._stochastic.bsa import bsa as bsa
from funcbilevel._stochastic.f2sa import f2sa as f2sa
from funcbilevel._stochastic.f3sa import f3sa as f3sa
from funcbilevel._stochastic.fsla import fsla as fsla
from funcbilevel._stochastic.ma_soba import ma_soba as ma_soba
from funcbilevel._stochastic.meha import meha as meha
from funcbilevel._stochastic.mrbo import mrbo as mrbo
from funcbilevel._stochastic.pbgd import pbgd as pbgd
from funcbilevel._stochastic.saba import saba as saba
from funcbilevel._stochastic.soba import soba as soba
from funcbilevel._stochastic.srba import srba as srba
from funcbilevel._stochastic.stocbio import stocbio as stocbio
from funcbilevel._stochastic.sustain import sustain as sustain
from funcbilevel._stochastic.ttsa import ttsa as ttsa
from funcbilevel._stochastic.vrbo import vrbo as vrbo
from funcbilevel._train import NonFiniteError as NonFiniteError
from funcbilevel._train import StopTraining as StopTraining
from funcbilevel._train import train as train
from funcbilevel._variable_projection import variable_projection as variable_projection

__all__ = [
    "Adjoint",
    "AdjointSystem",
    "BilevelSolver",
    "BilevelState",
    "CheckedEstimator",
    "Checkpoint",
    "CheckpointError",
    "Cost",
    "CostTable",
    "Diagnosis",
    "Estimator",
    "Finding",
    "FiniteSum",
    "FitState",
    "FrozenState",
    "FunctionalProblem",
    "Hypergradient",
    "HypergradientCheck",
    "HypergradientError",
    "InnerSolution",
    "Kernel",
    "LinearHead",
    "LinearSolver",
    "Method",
    "MethodTable",
    "Minibatches",
    "Model",
    "NonFiniteError",
    "ParametricProblem",
    "Partition",
    "Predictor",
    "ProcessError",
    "Rollback",
    "Sampler",
    "StopTraining",
    "aid",
    "alternating",
    "amigo",
    "argmin",
    "bilevel",
    "bome",
    "bsa",
    "cg",
    "check_hypergradient",
    "compare_costs",
    "cost",
    "custom_fixed_point",
    "custom_root",
    "darts",
    "data_parallel",
    "diagnose",
    "evolution_strategy",
    "f2sa",
    "f3sa",
    "finite_sum",
    "followers",
    "from_function",
    "from_lineax",
    "from_linen",
    "from_nnx",
    "fsla",
    "fully_sharded",
    "funcid",
    "gaussian_kernel",
    "gmres",
    "gradient_descent",
    "gradient_penalty",
    "hypergradient",
    "hypergradient_error",
    "identity",
    "itd",
    "kernel_adjoint",
    "kernel_model",
    "kkt_conditions",
    "learned_adjoint",
    "linear_adjoint",
    "linear_kernel",
    "log_jsonl",
    "log_tensorboard",
    "ma_soba",
    "matern_kernel",
    "measure_costs",
    "meha",
    "methods",
    "microbatched",
    "microbatched_objective",
    "mixed_precision",
    "mrbo",
    "neumann",
    "normal_cg",
    "nystrom_cg",
    "parametrize",
    "partition",
    "pbgd",
    "pointwise_adjoint",
    "predictor",
    "projection_affine",
    "prox_aid",
    "prox_group_lasso",
    "prox_l1",
    "proximal",
    "pzobo",
    "saba",
    "soba",
    "srba",
    "state_from_arrays",
    "state_to_arrays",
    "stocbio",
    "sustain",
    "train",
    "ttsa",
    "value_penalty",
    "variable_projection",
    "vrbo",
]

__version__ = "0.1.0"
