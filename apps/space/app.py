"""What a Space runs: the lab's public page over the releases beside this file."""

import os
from pathlib import Path

from apps.lab.library import Library
from apps.lab.page import launch

launch(
    Library(Path(__file__).parent / "releases"),
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    public=True,
    host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
)
