"""Run the notebooks of this folder and keep what they print and draw: python execute.py [NAME…]."""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SECONDS = 600  # for a cell, on a slow machine


def code_of(notebook):
    """A name for the code: outputs belong to it, and to no other."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()


def execute(notebook, folder):
    """Run it in a folder, where it may write."""
    resources = {"metadata": {"path": str(folder)}}
    # of tqdm, where no widgets are installed: torch loads it
    environment = {**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"}
    options = {"kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources=resources, timeout=SECONDS, **options).execute(
        env=environment
    )
    notebook.metadata["code"] = code_of(notebook)
    notebook.metadata.pop("widgets", None)


def main(names):
    for path in sorted(HERE.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, folder)
        nbformat.write(notebook, path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
