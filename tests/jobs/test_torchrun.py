"""What the settings say about processes and sharding, as job.json gets it or the gateway refuses it."""

from __future__ import annotations

import sys

import pytest

from gateway.errors import SettingsError
from gateway.jobdir import Launch
from gateway.jobs.torchrun import is_group, launch_for, read_launch
from gateway.settings import JobSettings


def test_a_job_is_trained_by_one_process_unless_the_settings_say_otherwise() -> None:
    assert read_launch(JobSettings()) == Launch()
    assert not is_group(Launch())
    assert read_launch(JobSettings(processes=4, sharding="fsdp")) == Launch(4, "fsdp")
    assert is_group(Launch(4, "fsdp"))


def test_a_model_is_not_split_over_one_process() -> None:
    with pytest.raises(SettingsError, match=r"sharding is 'fsdp'.*but processes is 1"):
        read_launch(JobSettings(sharding="fsdp"))


def test_zero_is_refused_by_name_where_deepspeed_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as the import system has what is not there
    with pytest.raises(SettingsError, match=r"'zero3', which needs DeepSpeed.*tunegate\[deepspeed\]"):
        read_launch(JobSettings(processes=2, sharding="zero3"))


def test_kto_is_trained_by_one_process_whatever_the_settings_say() -> None:
    assert launch_for(Launch(4, "fsdp"), "kto") == Launch()
    assert launch_for(Launch(4, "fsdp"), "dpo") == Launch(4, "fsdp")
