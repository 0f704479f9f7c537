"""batchnorm watch: a script prints and ends as it does alone."""

import json
from pathlib import Path

import pytest

import scripts as five
from processes import run

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys, torch
from torch import nn

print("arguments", sys.argv, __name__, __file__)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.9), nn.Flatten(), nn.Linear(144, 2))
{compiled}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(60):
    x = torch.randn(8, 1, 8, 8)
    loss = nn.functional.cross_entropy(model(x), (x.mean((1, 2, 3)) > 0).long())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, loss.item())
{end}
"""


ENDS = {
    "well": "",
    "a status": "sys.exit(7)",
    "a message": "sys.exit('bad')",
    "an error": "raise KeyError('a')",
}


AROUND = """
import atexit, os, sys, threading, time, torch
from torch import nn
atexit.register(lambda: print("atexit", sys.argv, sys.modules["__main__"].__loader__.path[-8:]))
sys.excepthook = lambda kind, error, frames: print("hook", kind.__name__, file=sys.stderr)
class Net(nn.Sequential):
    def forward(self, x):
        print("forward", __builtins__.__name__)
        self.cache = super().forward(x)
        return self.cache
model = Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.99))
model(torch.randn(4, 3, 8, 8))
threading.Thread(target=lambda: (time.sleep(0.3), print("later", sys.argv))).start()
sys.stdout.flush()
if os.fork() == 0:
    sys.exit(7)
os.wait()
if sys.argv[1] == "raise":
    raise ValueError("at the end")
if sys.argv[1] == "interrupt":
    raise KeyboardInterrupt
if sys.argv[1] == "close":
    os.close(2)
    sys.exit(5)
"""


class TestScripts:
    @pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
    def test_output_status_and_numbers_are_the_script_s(self, tmp_path, end):
        (tmp_path / "train.py").write_text(SCRIPT.format(end=end, compiled=""))
        alone = run("train.py", "--rate", "3", cwd=tmp_path)
        watched = run("-m", "batchnorm", "watch", "train.py", "--rate", "3", cwd=tmp_path)
        assert watched.stdout == alone.stdout
        assert watched.returncode == alone.returncode
        assert "BN011 warning" in watched.stderr
        if alone.stderr:  # the same traceback, but for the path that Python prints absolute
            assert alone.stderr.splitlines()[-1] in watched.stderr

    @pytest.mark.parametrize("end", ["", "raise", "interrupt", "close"])
    def test_what_python_does_around_a_script(self, tmp_path, end):
        (tmp_path / "train.py").write_text(AROUND)
        alone = run("train.py", end, cwd=tmp_path)
        watched = run("-m", "batchnorm", "watch", "train.py", end, cwd=tmp_path)
        assert sorted(watched.stdout.splitlines()) == sorted(alone.stdout.splitlines())
        shown = {-2: 130}  # ended by a signal: what a shell makes of it
        assert watched.returncode == shown.get(alone.returncode, alone.returncode)
        assert alone.stderr.strip() in watched.stderr
        assert watched.stderr.count("BN011") == (0 if end == "close" else 2)  # and in --explain

    @pytest.mark.parametrize("command", ["module", "console"])
    def test_modules_are_looked_for_where_python_looks(self, tmp_path, command):
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "a.py").write_text("import sys; print(sys.path)")
        start = "import sys; from batchnorm.cli import main; sys.argv[0] = 'batchnorm'; main()"
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "start.py").write_text(start)
        how = ["-m", "batchnorm"] if command == "module" else ["bin/start.py"]
        alone = run("sub/a.py", cwd=tmp_path)
        watched = run(*how, "watch", "sub/a.py", cwd=tmp_path)
        assert watched.stdout == alone.stdout

    def test_a_batchnorm_of_the_script_s_own_is_said(self, tmp_path):
        (tmp_path / "batchnorm.py").write_text("x = 1")
        (tmp_path / "train.py").write_text("print('ran')")
        start = "import sys; from batchnorm.cli import main; main()"
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "start.py").write_text(start)
        watched = run("bin/start.py", "watch", "train.py", cwd=tmp_path)
        assert watched.returncode == 2
        assert "beside a batchnorm.py of its own" in watched.stderr
        assert not watched.stdout

    def test_a_script_that_cannot_be_compiled(self, tmp_path):
        (tmp_path / "train.py").write_text("x = (")
        alone = run("train.py", cwd=tmp_path)
        watched = run("-m", "batchnorm", "watch", "train.py", cwd=tmp_path)
        assert watched.returncode == alone.returncode == 1
        assert watched.stderr.startswith(alone.stderr)

    def test_a_compiled_model_is_watched(self, tmp_path):
        script = SCRIPT.format(end="", compiled="model = torch.compile(model, backend='eager')")
        (tmp_path / "train.py").write_text(script)
        alone = run("train.py", cwd=tmp_path)
        watched = run("-m", "batchnorm", "watch", "train.py", cwd=tmp_path)
        assert watched.stdout == alone.stdout
        assert "BN011 warning" in watched.stderr, watched.stderr

    def test_modules_files_and_guarding(self, tmp_path):
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "train.py").write_text(SCRIPT.format(end="", compiled=""))
        watched = run(
            "-m", "batchnorm", "watch", "--guard", "--json", "f.json", "--page", "f.html", "-m",
            "package.train", cwd=tmp_path,
        )  # fmt: skip
        assert watched.returncode == 3
        (content,) = json.loads((tmp_path / "f.json").read_text())
        assert {f["rule"] for f in content["findings"]} >= {"BN011"}
        assert "BN011" in (tmp_path / "f.html").read_text()

    def test_no_norm_is_said(self, tmp_path):
        (tmp_path / "a.py").write_text("print('nothing')")
        watched = run("-m", "batchnorm", "watch", "a.py", cwd=tmp_path)
        assert watched.stdout == "nothing\n"
        assert "no model with batch norm" in watched.stderr


FOUND = {
    "1": "BN002 error",
    "2": "BN011 warning",
    "3": "BN003 warning",
    "4": "BN006 error",
    "5": "BN016 warning",
}


@pytest.mark.parametrize("pair", five.pairs(), ids=lambda pair: pair[0].stem)
def test_the_five_scripts_are_found_and_repaired(pair):
    broken, repaired = pair
    assert FOUND[broken.name[0]] in five.run(broken)
    assert "BN0" not in five.run(repaired)
    page = (ROOT / "docs" / "five-scripts.md").read_text(encoding="utf-8")
    assert f"$ batchnorm watch {broken.name}" in page
    assert f"$ batchnorm watch {repaired.name}" in page
