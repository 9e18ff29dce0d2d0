"""Stochastic and single-loop solvers, one published method per file.

Each method is a factory that returns a `BilevelSolver`, and three things of its own: a NamedTuple of what it carries
beside omega and theta (`BilevelState.estimator_state`), a function that makes it, and `update`, one outer step:

    update(state, draws, key) -> (state, Report)

Everything else is shared.

- `_loop.solver` makes init, step and run of it: checks, keys, draws, metrics, and what happens where numbers are not
  finite.
- `Draws` gives the i-th inner and outer samples of this outer step, of whatever kind the sources are (see `_draws`). A
  method numbers its draws and says how many they are; two uses of one number see the same samples. So "fresh samples
  for each Hessian product" is another number for each, and a plain batch serves them all, as everywhere in the library.
- `_oracles` holds what methods are made of: one gradient, one Hessian product, all derivatives at once (`directions`),
  and the Neumann series for u = H^-1 d.
- Step sizes: each level has an optimizer, given as a number, as a schedule of the outer step, or as an optax optimizer,
  which gets the published direction in place of a gradient.

In all formulas G = L_in, F = L_out, and u stands for H^-1 d_theta F, so that the hypergradient is d_omega F -
d^2_omega_theta G u as in AID. Papers that write v = -H^-1 d_theta F have the same iterates with v = -u.
"""
