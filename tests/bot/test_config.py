"""The config: its defaults, its example file, and one line for each mistake."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from bot.config import Config, list_known_keys, load
from bot.errors import ConfigError
from bot.store.database import Database


def test_the_example_file_holds_every_key_at_its_default_with_a_comment():
    text = (ROOT / "config.example.toml").read_text()
    example = load(ROOT / "config.example.toml")
    assert example == Config()
    text = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.M)
    assert "temperature" not in example.policy.model_fields_set, "what depends on the model is commented out"
    shown = tomllib.loads(text)
    keys = [f"{section}.{key}" for section, found in shown.items() if isinstance(found, dict) for key in found]
    keys += [key for key, value in shown.items() if not isinstance(value, dict)]
    assert sorted(keys) == sorted(list_known_keys())
    assert Config.model_validate(shown) == Config()
    for line in text.splitlines():
        if re.match(r"\w+ =", line):
            assert "#" in line, f"no comment: {line}"


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"polcy": {}}, "config key 'polcy' is not known; did you mean 'policy'?"),
        ({"policy": {"modle": "demo"}}, "'policy.modle' is not known; did you mean 'policy.model'?"),
        ({"policy": {"temperature": "hot"}}, "config key 'policy.temperature' has value 'hot'"),
        ({"seed": -1}, "config key 'seed' has value -1"),
        ({"learning": {"distil_every": 0}}, "'learning.distil_every' has value 0"),
        ({"learning": {"min_reactions": 0}}, "'learning.min_reactions' has value 0"),
        ({"learning": {"distil_prompts": -1}}, "'learning.distil_prompts' has value -1"),
        (
            {"learning": {"min_reactions": 5, "distil_every": 7}},
            "'learning.min_reactions' is the older name of 'learning.distil_every', which is set too; remove one",
        ),
        ({"serving": {"max_lora_rank": 7}}, "config key 'serving.max_lora_rank' has value 7"),
        (
            {"serving": {"url": "localhost:8000"}},
            "config key 'serving.url' has value 'localhost:8000'; write http://HOST:PORT",
        ),
        ({"database": {"url": "sqlite:///x", "url_env": "URL"}}, "database.url and database.url_env are both set"),
        (
            {"policy": {"temperature": 1e-9}},
            "'policy.temperature' has value 1e-09; input should be greater than or equal to 0.01",
        ),
        ({"training": {"learning_rate": float("inf")}}, "'training.learning_rate' has value inf"),
        (
            {"rewards": {"asker_weight": float("inf")}},
            "'rewards.asker_weight' has value inf; input should be a finite number",
        ),
        ({"gate": {"probe_tolerance": float("nan")}}, "'gate.probe_tolerance' has value nan"),
        ({"training": {"batch_size": 10**9}}, "'training.batch_size' has value 1000000000"),
        ({"discord": {"reconcile_hours": 1e9}}, "'discord.reconcile_hours' has value 1000000000.0; input should be less"),
        ({"slack": {"reconcile_hours": 1e9}}, "'slack.reconcile_hours' has value 1000000000.0; input should be less"),
        ({"training": {"max_length": 16}}, "'training.max_length' has value 16"),
        ({"training": {"processes": 99}}, "training.processes has value 99, too many for training.batch_size (16)"),
        ({"training": {"processes": 3, "batch_size": 4}}, "each needs 2 answers per step; lower the first"),
        ({"serving": {"port": 8080}}, "config keys serving.port and web.port both have value 8080; use two different ports"),
        (
            {"web": {"port": 9}, "slack": {"port": 9, "signing_secret_env": "SECRET"}},
            "config keys web.port and slack.port both have value 9",
        ),
        ({"serving": {"url": "http://here:99999"}}, "'serving.url' has value 'http://here:99999'; "),
        ({"serving": {"url": "http://::1:8000"}}, "'serving.url' has value 'http://::1:8000'; "),
        ({"training": {"lora_rank": 64}}, "training.lora_rank has value 64, above serving.max_lora_rank (16)"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key_the_value_and_the_fix(values, wanted):
    with pytest.raises(ConfigError) as error:
        load(**values)
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


def test_ports_that_nobody_listens_on_or_that_are_any_free_one_may_be_equal():
    load(serving={"port": 8080}, web={"enabled": False})
    load(serving={"port": 8080, "url": "http://127.0.0.1:8080"})
    load(slack={"port": 8080})
    load(web={"port": 0}, slack={"port": 0, "signing_secret_env": "SECRET"})
    assert load(serving={"url": "http://[::1]:8000/v1"}).serving.url == "http://[::1]:8000"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [(b"seed = ", "not valid TOML"), (b"seed = '\xff'", "not UTF-8"), (None, "cannot be read")],
)
def test_a_config_file_that_cannot_be_read_says_so(tmp_path, content, wanted):
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=wanted):
        load(path)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"discord": {"token_env": "secret.of-discord"}}, "discord.token_env"),
        ({"serving": {"api_key_env": "sk-secret"}}, "serving.api_key_env"),
        ({"serving": {"url": "http://ann:secret@host:8000"}}, "serving.url"),
        ({"database": {"url_env": "postgresql://ann:secret@host/db"}}, "database.url_env"),
        ({"database": {"url": ["postgresql://ann:secret@host/db"]}}, "database.url"),
        ({"database": "postgresql://ann:secret@host/db"}, "database"),
        ({"database": {"ulr": "postgresql://ann:secret@host/db"}}, "database.ulr"),
    ],
)
def test_a_secret_at_the_wrong_place_is_refused_and_not_shown(values, key):
    with pytest.raises(ConfigError, match=f"config key '{re.escape(key)}'") as error:
        load(**values)
    assert "secret@" not in str(error.value)
    assert "sk-" not in str(error.value)
    assert "secret.of" not in str(error.value)
    assert error.value.__cause__ is None, "nor in a traceback"


def test_what_is_shown_of_a_database_holds_no_password():
    for url in ("postgresql+psycopg://ann:secret@host/db", "postgresql+psycopg://ann@host/db?password=secret"):
        database = Database(url)
        assert "secret" not in database.url
        assert "ann" in database.url
        database.close()


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_a_server_is_named_by_its_address_or_as_its_clients_name_it(path):
    assert load(serving={"url": f" http://host:8000{path} "}).serving.url == "http://host:8000"
    assert load(serving={"url": f"https://host/behind{path}"}).serving.url == "https://host/behind"


def test_the_key_of_a_server_is_read_from_its_variable(monkeypatch):
    monkeypatch.setenv("KEY", "word\n")
    assert load(serving={"api_key_env": "KEY"}).serving.read_key() == "word"
    monkeypatch.delenv("KEY")
    with pytest.raises(ConfigError, match=r"serving\.api_key_env has value 'KEY', a variable that is not set"):
        load(serving={"api_key_env": "KEY"}).serving.read_key()


def test_the_databases_url_comes_from_its_variable_and_is_saved_nowhere(tmp_path, monkeypatch):
    url = "postgresql+psycopg://ann:hunter2@host/db"
    config = load(database={"url_env": "URL"})
    with pytest.raises(ConfigError, match=r"database\.url_env has value 'URL', a variable that is not set"):
        config.database_url  # noqa: B018 (it reads the variable)
    monkeypatch.setenv("URL", f"{url}\n")
    assert config.database_url == url
    for one in (config, load(database={"url": url})):
        assert one.database_url == url
        one.save(tmp_path / "config.json")
        assert "hunter2" not in (tmp_path / "config.json").read_text()
        assert "hunter2" not in repr(one.without_secrets())
    config.save(tmp_path / "config.json")
    assert load(tmp_path / "config.json").database_url == url, "a process that is given the variable finds the database"


def unit_lines() -> list[str]:
    return [line for line in (ROOT / "docs" / "kibitz.service").read_text().splitlines() if not line.startswith("#")]


def test_the_systemd_unit_stops_kibitz_before_its_vllm_and_starts_it_again_whatever_it_failed_of():
    unit = unit_lines()
    assert "KillMode=mixed" in unit, "else vLLM is ended while answers are still being drained"
    assert {"Restart=on-failure", "StartLimitIntervalSec=0"} <= set(unit)
    assert unit.index("StartLimitIntervalSec=0") < unit.index("[Service]"), "systemd reads it in [Unit] alone"
    assert not [line for line in unit if line.startswith("RestartPreventExitStatus")], (
        "a database that is late is code 2 too"
    )


def test_all_that_the_systemd_unit_has_written_lies_where_it_may_be_written():
    unit = unit_lines()
    assert {"ProtectSystem=strict", "StateDirectory=kibitz"} <= set(unit)
    written = dict(line.split("=")[1:] for line in unit if line.startswith("Environment="))
    assert {"HOME", "KIBITZ_CACHE"} <= set(written)
    assert all(Path(path).is_relative_to("/var/lib/kibitz") for path in written.values())


def test_the_containers_install_torch_keep_their_caches_and_run_as_the_owner_of_the_data():
    docker = (ROOT / "Dockerfile").read_text().splitlines()
    assert docker.index("ENV HOME=/data") > max(number for number, line in enumerate(docker) if "make setup" in line)
    assert "RUN useradd --uid 1000 --home-dir /data --create-home kibitz" in docker
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        assert service["user"] == "${KIBITZ_UID:-1000}:${KIBITZ_GID:-1000}", name
        assert "./kibitz-data:/data" in service["volumes"], name
    recipe = (ROOT / "Makefile").read_text()
    assert "TORCH_INDEX" in services["kibitz-cpu"]["build"]["args"]
    assert recipe.index("run make setup TORCH_INDEX=URL") > recipe.index("torch-cpu:"), "without it the build says so"
    assert recipe.index("--no-print-directory torch-cpu") < recipe.index("'.[$(EXTRA)$(DEV)]'"), "and at once"


def test_the_older_name_of_a_key_still_works_and_is_saved_as_the_new_one(tmp_path):
    config = load(learning={"min_reactions": 5})
    assert config.learning.distil_every == 5 != load().learning.distil_every
    config.save(tmp_path / "config.json")
    assert "min_reactions" not in (tmp_path / "config.json").read_text()
    assert load(tmp_path / "config.json") == config


def test_a_saved_config_reads_back_the_same(tmp_path):
    config = load(seed=7, policy={"temperature": 0.5})
    config.save(tmp_path / "config.json")
    assert load(tmp_path / "config.json") == config
