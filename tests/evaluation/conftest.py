"""One evaluation for all tests that only read it."""

import pytest

from tests.evaluation.sample_results import write_results


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory):
    """Folder of an evaluation: the student draws twice as many prompts well as the teacher at few steps."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_results(folder, {"teacher": 0.7, "teacher4": 0.3, "student": 0.6})
    return folder
