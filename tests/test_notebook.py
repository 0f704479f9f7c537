"""In a notebook the bars move in their cell, and a comparison shows itself."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
CELLS = [
    (
        "import batchnorm, tiny\n"
        "from batchnorm.views import console\n"
        "console.NOTEBOOK_SECONDS = 0  # drawn at every step, however fast they are\n"
        "result = batchnorm.compare(\n"
        "    data=tiny.as_images(), epochs=3, batch_size=32, threads=2, out={out!r}\n"
        ")"
    ),
    "result",
    "result.plot()",
]


class Client(NotebookClient):
    """Counts how often an output was drawn anew."""

    updates = 0

    def process_message(self, message, cell, cell_index):
        self.updates += message["msg_type"] == "update_display_data"
        return super().process_message(message, cell, cell_index)


def test_a_comparison_in_a_notebook(tmp_path):
    cells = [nbformat.v4.new_code_cell(code.format(out=str(tmp_path))) for code in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = Client(notebook, resources={"metadata": {"path": str(HERE)}}, timeout=300)
    client.execute()
    trained, shown, plotted = (cell.outputs for cell in notebook.cells)
    bars = [o.data["text/html"] for o in trained if o.output_type == "display_data"]
    assert len(bars) == 1
    assert "none, seed 0" in bars[0]
    assert "3.0/3" in bars[0]
    assert client.updates > 2
    assert "<table>" in shown[0].data["text/html"]
    assert shown[0].data["text/plain"] == f"Comparison of none, batch in {tmp_path}"
    assert plotted[0].data["image/png"]
