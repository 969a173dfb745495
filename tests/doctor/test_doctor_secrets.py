"""Nothing that the doctor shows or writes holds a secret, whatever servers and settings do with it."""

from __future__ import annotations

import pytest
from faulty_http import served
from model_lists import model_list

from sif_ray.doctor import machine
from sif_ray.doctor.redaction import HIDDEN, hide, secrets_in

SECRET = "sk-7f3a91c0d2e84b55"


@pytest.mark.parametrize("value", [SECRET, f"{SECRET}\n", f'"{SECRET}"', f"{SECRET} trailing", f"Bearer: {SECRET}"])
def test_a_key_is_shown_nowhere(doctor, grpo, monkeypatch, value):
    """Against a server that refuses it and repeats it, one that names a model after it, and in a broken form."""
    monkeypatch.setenv("DOCTOR_JUDGE_KEY", value)
    for app in (model_list("another", ["judge"]), model_list("", [SECRET, f"x-{SECRET}"])):
        with served(app) as url:
            settings = ["judge.kind=llm", "judge.model=judge", f"judge.base_url={url}/v1"]
            diagnosis = doctor(*grpo, *settings, "judge.api_key_env=DOCTOR_JUDGE_KEY")
        assert diagnosis.status == 1
        assert SECRET not in diagnosis.shown + diagnosis.text


def test_secrets_of_others_and_passwords_in_urls_are_not_shown(doctor, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-of-a-cluster")

    def broken():
        raise RuntimeError(f"{SECRET} and a-token-of-a-cluster at s3://someone:password-9@bucket/x")

    monkeypatch.setattr(machine, "measure", broken)
    diagnosis = doctor()
    assert diagnosis.status == 1
    [fault] = diagnosis.faults
    assert fault["found"].endswith(f"RuntimeError: {HIDDEN} and {HIDDEN} at s3://{HIDDEN}@bucket/x")
    for secret in (SECRET, "a-token-of-a-cluster", "password-9"):
        assert secret not in diagnosis.shown + diagnosis.text


def test_what_is_hidden():
    environ = {
        "OPENAI_API_KEY": "0123456789",
        "RAY_AUTH_TOKEN_PATH": "/home/somebody/token",
        "TOKENIZERS_PARALLELISM": "false-false",
        "AWS_SECRET_ACCESS_KEY": "abcdefghijkl",
        "RAY_AUTH_MODE": "token",
        "MY_JUDGE": "word",
        "SERVE_KEYS": "alice: key-of-alice\nbob: key-of-bob",
    }
    secrets = secrets_in(environ, {"MY_JUDGE"})
    text = hide("0123456789 /home/somebody/token false-false abcdefghijkl token word key-of-bob", secrets)
    assert text == f"{HIDDEN} /home/somebody/token false-false {HIDDEN} token {HIDDEN} {HIDDEN}"
