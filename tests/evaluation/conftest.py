import pytest

from rfkernels.evaluation.classifier import Judge, Study, train_judge
from rfkernels.evaluation.composition import Examiner
from rfkernels.train.glyphs import Bank
from tests.train.banks import make_bank

SHORT = Study(rounds=60, width=128, batch=32)


@pytest.fixture(scope="session")
def bank() -> Bank:
    return make_bank(32)


@pytest.fixture(scope="session")
def judge(bank) -> Judge:
    return train_judge(bank, SHORT)


@pytest.fixture(scope="session")
def examiner(bank, judge) -> Examiner:
    return Examiner(bank, judge)
