"""The doctor: a row for each thing that is needed, on the real vLLM and with a real training step."""

import asyncio
import json
import shutil
import socket
import sqlite3

import pytest
from conftest import migrate, refused, write_config
from fake_vllm import FakeVllm

from bot.checks import CheckResult, Skipped, has_passed, run_checks
from bot.cli.doctor import check_ports, list_machine_checks
from bot.config import load
from bot.data_directory import lock_directory
from bot.errors import ConfigError
from bot.store.database import Database
from learning.data.selection import select_usable
from learning.rollout.self_test import SelfTest, make_rows


def rows_of(config) -> dict[str, CheckResult]:
    return {row.what: row for row in run_checks(list_machine_checks(config))}


def test_an_error_for_people_is_a_row_with_what_to_do():
    def broken() -> str:
        raise ConfigError("the key is gone; look under the mat; or in the pot")

    def beside_the_point() -> str:
        raise Skipped("there is no door")

    rows = run_checks([("key", broken), ("door", beside_the_point), ("house", lambda: "stands")])
    assert rows == [
        CheckResult("key", "not", "the key is gone; look under the mat", "or in the pot"),
        CheckResult("door", "skip", "there is no door"),
        CheckResult("house", "ok", "stands"),
    ]
    assert not has_passed(rows)
    assert has_passed(rows[1:])


def test_a_check_that_breaks_off_is_a_row_and_the_rest_is_looked_at():
    rows = run_checks([("bug", lambda: str(1 / 0)), ("house", lambda: "stands")])
    found = "the check crashed (ZeroDivisionError: division by zero)"
    assert rows == [CheckResult("bug", "not", found, "report this as a bug of kibitz"), CheckResult("house", "ok", "stands")]
    with pytest.raises(KeyboardInterrupt):  # the control: what is no error of a check ends it
        run_checks([("interrupted", interrupt)])


def interrupt() -> str:
    raise KeyboardInterrupt


def test_the_machine_that_passes_these_tests_is_well(config):
    config = config.model_copy(update={"web": config.web.model_copy(update={"port": 0})})
    rows = rows_of(config)
    assert has_passed(list(rows.values())), rows
    assert set(rows) == {"Python", "torch", "vLLM", "GPU", "memory", "disk", "ports", "database"}


def test_a_port_that_is_taken_and_a_database_that_is_none(config, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        busy = config.model_copy(update={"web": config.web.model_copy(update={"port": port})})
        row = rows_of(busy)["ports"]
        assert row.outcome == "not"
        assert f"web.port has value {port}" in row.found
        assert row.to_do == "free it, or choose another"
        with lock_directory(config.data, "serve"), pytest.raises(Skipped):
            check_ports(busy)
    (tmp_path / "kibitz.db").write_text("no database " * 1000)
    assert rows_of(load(data_dir=str(tmp_path)))["database"].outcome == "not"


@pytest.mark.parametrize("key", ["web", "slack"])
def test_a_host_of_ipv6_is_looked_at_as_it_is_listened_on(config, key):
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        there = (
            {"host": "::1", "port": port, "signing_secret_env": "SECRET"}
            if key == "slack"
            else {"host": "::1", "port": port}
        )
        off = {"web": {"enabled": False}}
        wants = load(data_dir=str(config.data), **(off | {key: there}))
        row = rows_of(wants)["ports"]
        assert (row.outcome, row.to_do) == ("not", "free it, or choose another")
        assert f"{key}.port has value {port}, which is in use on ::1" in row.found
    assert rows_of(wants)["ports"].outcome == "ok", "the control"


def test_a_host_that_is_none_is_a_row_and_no_bug(config):
    for host in ("nowhere.invalid", "[::1]", "a..b"):
        row = rows_of(config.model_copy(update={"web": config.web.model_copy(update={"host": host, "port": 0})}))["ports"]
        assert (row.outcome, row.to_do) == ("not", "free it, or choose another")
        assert f"on {host}" in row.found


def test_the_doctor_leaves_a_database_as_it_is(config):
    file = config.data / "kibitz.db"
    row = rows_of(config)["database"]
    assert (row.outcome, row.found) == ("ok", f"sqlite:///{file} has no tables yet; the first start makes them")
    assert not file.exists()
    database = Database(config.database_url, config.data)
    database.upgrade()
    newest = database.newest_revision
    assert rows_of(config)["database"].found == f"sqlite:///{file}"
    migrate(database, "-1")
    older = database.find_revision()
    assert older != newest
    database.close()
    before = file.read_bytes()
    row = rows_of(config)["database"]
    assert (row.outcome, row.found) == ("ok", f"sqlite:///{file} will be migrated, from schema {older} to {newest}")
    assert file.read_bytes() == before
    assert not list(config.data.glob("kibitz.db-*"))
    with sqlite3.connect(file) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    row = rows_of(config)["database"]
    assert (row.outcome, row.to_do) == ("not", "install the kibitz that wrote it, or a newer one")


def test_the_doctor_leaves_the_file_of_another_program_as_it_is(config, tmp_path):
    with sqlite3.connect(tmp_path / "other.db") as raw:
        raw.execute("CREATE TABLE mine (id INTEGER)")
    before = (tmp_path / "other.db").read_bytes()
    rows_of(load(data_dir=str(config.data), database={"url": f"sqlite:///{tmp_path / 'other.db'}"}))
    assert (tmp_path / "other.db").read_bytes() == before


def test_what_a_step_is_made_on_is_of_use_to_every_objective(tokenizer):
    rows = make_rows(tokenizer, 8, 40)
    assert all(len(row.prompt_ids) + len(row.completion_ids) == 40 for row in rows)
    for objective in ("kto", "bco", "dpo", "sft", "pg", "mixed"):
        assert len(select_usable(rows, objective)) >= 4


def test_a_quick_look_at_a_model_that_is_broken(tmp_path, demo_model, here):
    broken = shutil.copytree(demo_model, tmp_path / "model")
    next(broken.glob("*.safetensors")).unlink()
    config = write_config(tmp_path, str(broken), "")
    config.write_text(config.read_text() + "[web]\nport = 0\n")
    done = here("doctor", "--quick", "--config", config, "--json", tmp_path / "out.json")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stderr.strip()
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert figures["model"]["outcome"] == "not"
    assert figures["model"]["to_do"] == "download it again"
    assert figures["chat template"]["outcome"] == "skip"
    assert "one token" not in figures
    for command in (["chat"], ["serve"], ["simulate", "--model", broken]):
        refused(here(*command, "--config", config), "has no weights")


def test_a_look_at_weights_that_are_not_those_of_the_config(tmp_path, demo_model):
    model = shutil.copytree(demo_model, tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"intermediate_size": 512}))
    config = load(data_dir=str(tmp_path), policy={"model": str(model)})
    with SelfTest(config, lambda: (config, str(model))) as test:
        row = next(row for row in run_checks(test.list_quick_checks()) if row.what == "model")
    assert row.outcome == "not"
    assert "its config.json describes 128 x 512" in row.found


async def test_one_token_and_one_training_step(live, config):
    """On the one vLLM of the run, given by its URL; the step is a child process."""
    serving = config.serving.model_copy(update={"url": live.policy.admin.url})
    config = config.model_copy(update={"serving": serving})

    def look() -> dict[str, CheckResult]:
        with SelfTest(config, lambda: (config, config.policy.model)) as test:
            return {row.what: row for row in run_checks(test.list_checks())}

    before = await live.policy.admin.list_adapters()
    rows = await asyncio.to_thread(look)
    assert has_passed(list(rows.values())), rows
    assert "log-probability -" in rows["one token"].found
    assert "loss" in rows["one training step"].found
    assert rows["one version"].found == "an adapter was loaded, asked and unloaded"
    assert await live.policy.admin.list_adapters() == before
    assert not list(config.data.glob("doctor-*"))


async def test_a_vllm_that_takes_no_adapter_is_found_out(config, tokenizer):
    """One of our own stands for a vLLM that an operator started without what lets it take versions."""
    vllm = FakeVllm(tokenizer, lacks={"/v1/load_lora_adapter"})
    await vllm.start()
    serving = config.serving.model_copy(update={"url": vllm.url})
    config = config.model_copy(update={"serving": serving})

    def look() -> dict[str, CheckResult]:
        with SelfTest(config, lambda: (config, config.policy.model)) as test:
            test._model, test._url, test._version = config.policy.model, vllm.url, config.data
            return {row.what: row for row in run_checks([("one version", test.check_version)])}

    row = (await asyncio.to_thread(look))["one version"]
    await vllm.stop()
    assert row.outcome == "not"
    assert "refused /v1/load_lora_adapter (404)" in row.found
    assert row.to_do.startswith("start it with --enable-lora --max-lora-rank 16 and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True")
