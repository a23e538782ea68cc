"""A study of Optuna's whose trials are made in forked workers: study.py URL TRIALS"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import sys

import optuna

url, trials = sys.argv[1:]
optuna.logging.set_verbosity(optuna.logging.WARNING)
storage = optuna.storages.RDBStorage(url)
study = optuna.create_study(storage=storage, study_name="shop")


def end_well() -> None:
    multiprocessing.util.Finalize(None, storage.engine.dispose, exitpriority=10)


def work(number: int) -> None:
    study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2, n_trials=1)


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(3, end_well) as workers:
        workers.map(work, range(int(trials)), chunksize=1)
        workers.close()
        workers.join()
    print(len(study.trials))
    storage.engine.dispose()
