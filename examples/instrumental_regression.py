"""Instrumental regression in one call: what a price does to sales, with a band

Demand that nobody recorded moves both the price of a ticket and its sales; the cost of fuel moves the price alone.
`funcbilevel.iv.NeuralIV` follows scikit-learn's conventions, and is trained by FuncID. Regression of sales on price, by
the same data, takes the effect of demand for one of the price.
"""

import sys
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.ensemble import HistGradientBoostingRegressor

from funcbilevel.iv import NeuralIV


def structural(price: np.ndarray, season: np.ndarray) -> np.ndarray:
    """Sales if the price were set: few customers are lost below 20 euros, and few are left above 30."""
    return 100.0 - 60.0 / (1.0 + np.exp(-(price - 25.0) / 1.5)) + 10.0 * season


def draw(n: int, seed: int) -> tuple[np.ndarray, ...]:
    """Prices, fuel costs, sales and seasons."""
    rng = np.random.default_rng(seed)
    fuel, demand, season = rng.normal(size=(3, n))
    price = 25.0 + 3.0 * fuel + 2.0 * demand + season
    return price, fuel, structural(price, season) + 20.0 * demand + 5.0 * rng.normal(size=n), season


def main(num_steps: int = 40, num_members: int = 3) -> None:
    """Prints errors to the truth, and draws the curves."""
    price, fuel, sales, season = draw(2000, seed=0)
    done = 0

    def progress(state: Any, metrics: Any) -> None:
        nonlocal done
        done += len(metrics["outer_objective"])
        if sys.stderr.isatty():
            print(f"\r{done} of {num_steps} steps", end="", file=sys.stderr)

    instrumental = NeuralIV(num_steps=num_steps, num_members=num_members, ridge=0.1, random_state=0, callback=progress)
    instrumental.fit(price[:, None], fuel, sales, season)
    regression = HistGradientBoostingRegressor(random_state=0).fit(np.stack([price, season], axis=1), sales)

    test_price, _, _, test_season = draw(2000, seed=1)
    truth = structural(test_price, test_season)
    for name, predicted in {
        "regression": regression.predict(np.stack([test_price, test_season], axis=1)),
        "NeuralIV": instrumental.predict(test_price[:, None], test_season),
    }.items():
        print(f"{name}: root mean squared error {np.sqrt(np.mean((predicted - truth) ** 2)):.1f} tickets")
    strength = instrumental.first_stage_.f_statistic[0]
    print(f"first stage: F statistic {strength:.0f}; below 105 the instrument would be weak")

    prices = np.linspace(18, 32, 60)
    average = np.zeros_like(prices)  # the average season
    band = instrumental.predict_interval(prices[:, None], average)
    axes = (figure := Figure(figsize=(6.2, 3.8), layout="constrained")).subplots()
    axes.plot(price[:800], sales[:800], ".", color="0.8", ms=3, zorder=0, label="observed tickets")
    axes.plot(prices, structural(prices, average), "k--", label="truth")
    axes.plot(prices, regression.predict(np.stack([prices, average], axis=1)), "C1-.", lw=1.5, label="regression")
    axes.plot(prices, band.estimate, "C0", label="NeuralIV")
    axes.fill_between(prices, band.low, band.high, color="C0", alpha=0.25, label="NeuralIV, 95% interval")
    axes.set(xlabel="price (euros)", ylabel="sales in an average season (tickets)", xlim=(18, 32))
    axes.set_ylim(*np.quantile(sales, [0.01, 0.99]))
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig("instrumental_regression.png", dpi=110)


if __name__ == "__main__":
    main()
