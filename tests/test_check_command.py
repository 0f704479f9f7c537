"""batchnorm check: what it prints, its exit status, its page, what it mends."""

from pathlib import Path

import pytest
import torch

from commands import folder, invoke_unwrapped  # noqa: F401  # a fixture


class TestTheCommand:
    @pytest.mark.usefixtures("folder")
    def test_it_prints_and_ends_by_severity(self):
        status, said = invoke_unwrapped("check", "faulty:build")
        assert status == 3
        assert "BN011 warning A momentum that forgets" in said
        assert "layer.momentum = 1 - layer.momentum" in said
        assert invoke_unwrapped("check", "faulty:build", "--ignore", "BN011")[0] == 0
        status, said = invoke_unwrapped("check", "faulty:all_three", "--level", "note", "--json")
        assert status == 3
        assert "BN023" in said

    @pytest.mark.usefixtures("folder")
    def test_errors_end_with_4_and_the_page_is_written(self):
        import faulty

        model = faulty.build()
        model[1].running_var.fill_(-1)
        torch.save(model.state_dict(), "w.pt")
        arguments = ["check", "faulty:build", "--checkpoint", "w.pt", "--page", "found.html"]
        assert invoke_unwrapped(*arguments)[0] == 4
        page = Path("found.html").read_text(encoding="utf-8")
        assert "BN008" in page
        assert "http" not in page.replace("http-equiv", "")
        mended = ["--data", "faulty:loader", "--fix", "--to", "m.pt"]
        status, said = invoke_unwrapped(*arguments[:4], *mended, "--ignore", "BN011")
        assert status == 0, said
        assert "fixed: BN008" in said
        assert (torch.load("m.pt")["1.running_var"] > 0).all()

    def test_explain(self):
        status, said = invoke_unwrapped("check", "--explain", "bn016")
        assert status == 0
        assert "Activation checkpointing updates the running statistics twice." in said
        assert "the half-life is half of what it was meant to be" in said

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["check"], "wants package.module:function"),
            (["check", "faulty:number"], "gave a int"),
            (["check", "faulty:raises"], "raised KeyError"),
            (["check", "faulty:build", "--level", "high"], "there is no level"),
            (["check", "faulty:build", "--select", "BN999"], "there is no rule"),
            (["check", "--explain", "BN999"], "there is no rule"),
            (["check", "faulty:build", "--to", "a.pt"], "each wants the other"),
            (["check", "faulty:build", "--fix"], "each wants the other"),
            (["watch", "none.py"], "there is no script none.py"),
        ],
    )
    @pytest.mark.usefixtures("folder")
    def test_what_a_user_can_mend(self, arguments, message):
        status, said = invoke_unwrapped(*arguments)
        assert status == 2
        assert message in said
