"""Which variables hold secrets."""

from __future__ import annotations

import pytest

from sif_ray.secret_names import looks_secret


@pytest.mark.parametrize(
    "name",
    [
        "OPENAI_API_KEY",
        "JUDGE_APIKEY",
        "AWS_ACCESS_KEY_ID",
        "HF_TOKEN",
        "GITHUBTOKEN",
        "PGPASSWORD",
        "DB_PASSWD",
        "SERVE_KEYS",
        "api-token",
        "clientSecret",
        "GOOGLE_CREDENTIALS",
        "client_secret",
    ],
)
def test_names_of_secrets(name):
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "MAX_TOKENS",
        "TOKENIZERS_PARALLELISM",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN_PATH",
        "KEY_FILE",
        "KEYBOARD",
        "HOME",
        "SECRETARY",
        "AWS_SHARED_CREDENTIALS_FILE",
    ],
)
def test_names_of_other_things(name):
    assert not looks_secret(name)
