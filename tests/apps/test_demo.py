"""Without this `make demo DATA=...` would show a model of the data of an earlier demo as if it were of one's own."""

from pathlib import Path

from apps import demo


def test_a_demo_on_other_data_does_not_go_on_with_the_first(tmp_path, monkeypatch, manifest):
    monkeypatch.chdir(tmp_path)
    called = []

    def core_seg(*arguments: str) -> None:
        called.append(arguments)
        for flag in arguments:
            if flag.startswith("--name="):
                (Path("runs") / flag.removeprefix("--name=")).mkdir(parents=True)

    monkeypatch.setattr(demo, "core_seg", core_seg)
    trained = []
    for data in ("", str(manifest), str(manifest)):
        called.clear()
        demo.run_demo(data, 9, False, 0)
        trained.append([" ".join(command) for command in called if command[0] == "fit"])
    assert [len(commands) for commands in trained] == [3, 3, 0]
    assert all("--name=demo/" in command for command in trained[0])
    assert all(str(manifest) in command and "--name=demo/" not in command for command in trained[1])
    assert not any("runs/demo/" in command for command in trained[1])
