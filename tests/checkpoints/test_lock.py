"""What is recorded of an environment, and what is said of one that differs."""

from __future__ import annotations

import platform

from service import __version__
from service.checkpoints.lock import LIBRARIES, current_lock, lock_differences


def test_a_lock_names_what_is_installed_without_builds() -> None:
    lock = current_lock()
    assert set(lock) <= {"python", "deepseek-service", *LIBRARIES} and {"numpy", "tokenizers"} <= set(lock)
    assert (lock["python"], lock["deepseek-service"]) == (platform.python_version(), __version__)
    assert not any("+" in version for version in lock.values())


def test_the_same_environment_differs_in_nothing() -> None:
    assert lock_differences(current_lock()) == []


def test_differences_are_named() -> None:
    found = lock_differences({"numpy": "0.1", "nothing-of-the-kind": "3.0", "python": platform.python_version()})
    assert found == [f"numpy 0.1, here {current_lock()['numpy']}", "nothing-of-the-kind 3.0, here none"]
