"""The lab's page: its tabs, its looks, and the links that reopen a view."""

import html
import threading
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_file_obj_with_meta, traverse

from apps.lab import inspection, views
from apps.lab.library import KEPT_SECONDS, TIDIED_SECONDS, Library
from lab.errors import LabError

TITLE = "CORE-Seg lab: reason first, then segment"
ASSETS = Path(__file__).parent / "assets"
QUEUE = 32
"""Visitors that may wait for the model."""
KEPT_SESSIONS = 64
"""Of which gradio keeps what they were last shown, megabytes for each; those before must press Segment again."""


class Page(gr.Blocks):
    """Says what a visitor can mend, and nothing else of what went wrong; and fetches nothing."""

    async def process_api(self, block_fn, inputs: list[Any], *args, **kwargs):
        try:
            traverse(inputs, refuse_address, is_file_obj_with_meta)
            return await super().process_api(block_fn, inputs, *args, **kwargs)
        except LabError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
        except gr.Error as error:
            error.print_exception = False  # a visitor's slip is no trace in the server's log
            raise


def refuse_address(file: dict[str, Any]) -> None:
    """gradio would download it whole, of whatever size, into memory.

    Raises:
        LabError: For a file that is not an upload but an address.
    """
    if "://" in file["path"]:
        raise LabError("an address is not fetched; upload the file itself")


def build(library: Library, public: bool = False) -> gr.Blocks:
    """The page.

    Args:
        library: What there is to look at.
        public: For strangers: releases only, no runs, no records of a manifest.
    """
    cleaning = (TIDIED_SECONDS, KEPT_SECONDS)
    with Page(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=cleaning) as page:
        gr.Markdown(f"# {TITLE}")
        gr.HTML(f'<div class="notice">{views.NOTICE}</div>')
        with gr.Tabs() as tabs:
            with gr.Tab("Inspect", id="inspect"):
                linked = inspection.build(library, public)
            if not public:
                from apps.lab import blind, data, leaderboard, rewards, rollouts  # a Space has none of them

                with gr.Tab("Rewards", id="rewards"):
                    runs, metrics = rewards.build(library)
                with gr.Tab("Rollouts", id="rollouts"):
                    sampled = rollouts.build(library)
                with gr.Tab("Leaderboard", id="leaderboard"):
                    leaderboard.build(library)
                with gr.Tab("Blind", id="blind"):
                    blind.build(library, library.votes)
                with gr.Tab("Data", id="data"):
                    data.build(library)

        def reopen(request: gr.Request):
            """Look for new models and runs, and fill in what a link names; what is not there (any more) is left out."""
            asked = dict(request.query_params)
            models_asked, runs_asked = ([n for n in asked.get(key, "").split(",") if n] for key in ("models", "runs"))
            names = [name for name in models_asked if name in library.models()]
            chosen = [name for name in runs_asked if name in library.run_folders()]
            record = library.records.get(asked.get("record", ""))
            missing = len(models_asked) - len(names) + len(runs_asked) - len(chosen)
            if missing := missing + bool(asked.get("record") and not record):
                gr.Warning(f"{missing} of what this link names (models, runs, record) is not here: choose another.")
            query = asked.get("query", record.query if record else "")[: inspection.MAX_QUERY]
            filled = [
                gr.Dropdown(value=record.id) if record else gr.skip(),
                record.id if record else gr.skip(),
                query or gr.skip(),
                gr.Dropdown(list(library.models()), **({"value": names} if names else {})),
            ]
            if public:
                return filled
            tab = gr.Tabs(selected="rewards") if chosen else gr.skip()
            wanted = [name for name in asked.get("metrics", "").split(",") if name]
            return [
                tab,
                *filled,
                gr.Dropdown(wanted, value=wanted) if chosen and wanted else gr.skip(),
                gr.Dropdown(list(library.run_folders())),
                chosen,
            ]

        if public:
            page.load(reopen, None, linked, api_visibility="private")
        else:  # the metrics first: the runs fill in their own where there are none
            named = gr.State([])
            outputs = [tabs, *linked, metrics, sampled, named]
            page.load(reopen, None, outputs, api_visibility="private").then(
                lambda names: gr.Dropdown(rewards.labels(library), value=names), named, runs, api_visibility="private"
            )
    return page.queue(max_size=QUEUE)


def launch(library: Library, port: int, public: bool = False, block: bool = True, host: str = "127.0.0.1") -> str:
    """Serve the page on an address of this machine, at a free port when `port` is 0.

    Returns:
        The address.
    """
    page = build(library, public)
    threading.Thread(target=library.keep_tidy, daemon=True).start()
    _, url, _ = page.launch(
        server_name=host,
        server_port=port or None,
        prevent_thread_lock=True,
        quiet=True,
        head=f"<style>{(ASSETS / 'lab.css').read_text()}</style>",  # css= would be confined to .gradio-container
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        js=(ASSETS / "lab.js").read_text().partition("\n")[2],
        max_file_size="10mb" if public else "2gb",
        state_session_capacity=KEPT_SESSIONS,
    )
    print(f"Open {url} (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return url
