"""Where the command line writes: into what is no file, through links, and refused before anything was computed."""

import json
import os
import threading

import pytest

from hf_tokenprune import cli
from hf_tokenprune.reporting.collect import Report
from hf_tokenprune.writing import write_output


@pytest.fixture
def lines(monkeypatch):
    """`bench` and `report` compute nothing: what they are asked for is listed."""
    asked = []

    class Page:
        samples, model = (), type("Model", (), {"macs": ()})
        save = Report.save

        def html(self):
            return "<p>a page</p>"

        def save_plots(self, _):
            raise OSError("no plots today")

    monkeypatch.setattr(cli, "bench", lambda *_, **__: asked.append("bench") or {"a": 1})
    monkeypatch.setattr(cli, "format_bench", lambda result: str(result))
    monkeypatch.setattr(cli, "report", lambda *_, **__: asked.append("report") or Page())
    return asked


def line(command, target):
    options = {"bench": "--json", "report": "-o", "plots": "--plots"}
    return ["bench" if command == "bench" else "report", "model", options[command], str(target)]


@pytest.mark.parametrize("command", ["bench", "report"])
@pytest.mark.usefixtures("lines")
def test_a_pipe_stays_one_and_gets_all(tmp_path, command):
    fifo, got = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: got.append(fifo.read_text()), daemon=True)
    reader.start()
    assert cli.main(line(command, fifo)) == 0
    assert fifo.is_fifo()
    reader.join(10)
    assert got == ["<p>a page</p>"] if command == "report" else json.loads(got[0])["a"] == 1
    assert os.listdir(tmp_path) == ["fifo"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for words in ("made", "and made anew"):
        write_output(tmp_path / "link", words)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "file").read_text() == words
    assert os.listdir(tmp_path / "there") == ["file"]


@pytest.mark.parametrize("command", ["bench", "report", "plots"])
def test_what_cannot_be_written_is_told_first(lines, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locked").mkdir()
    access = os.access  # as for anybody but root
    monkeypatch.setattr(os, "access", lambda path, mode: os.path.basename(path) != "locked" and access(path, mode))
    assert cli.main(line(command, tmp_path / "locked" / "it")) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert lines == []


def test_a_file_is_no_folder_for_plots(lines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/plots"):
        assert cli.main(line("plots", place)) == 1
        assert f"{place} cannot be written" in capsys.readouterr().err
    assert lines == []


@pytest.mark.usefixtures("lines")
def test_the_page_is_there_whatever_happens_to_the_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line("plots", "plots")) == 1
    assert "no plots today" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "<p>a page</p>"
