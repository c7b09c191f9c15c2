"""The page on which a person labels figures: one at a time, with its caption, by keys.

Unusual here: the image stands in the page as text (a data: address), so that Gradio copies no patient's image into its
cache; and the browser says of which figure a key was pressed, so that a key pressed twice labels no figure unseen. The
page is served to this machine alone and loads nothing from elsewhere.
"""

import base64
import html
from functools import partial
from io import BytesIO

import gradio as gr

from ...image_processing_biod2c import upright_rgb
from ..images import decode
from .figures import Figures
from .labels import LABELS, Session

ACTIONS = (*LABELS, "back")  # the key of each is its first letter
RULE = (
    "**Polluted**: more than six sub-figures, or man-made content such as tables, plots and sketches. Else **clean**."
)
CSS = """
#figure img, #figure p { height: 58vh; width: 100%; object-fit: contain; background: #888; }
#figure figcaption { height: 14vh; overflow: auto; margin-top: 0.5em; }
#shown { display: none; }
"""
HEAD = """<script>
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const button = document.getElementById("key-" + event.key.toLowerCase());
  if (button) { event.preventDefault(); button.click(); }
});
</script>"""


def make_page(figures: Figures, session: Session) -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(title="Label figures", analytics_enabled=False) as page:
        progress = gr.Markdown()
        view = gr.HTML(elem_id="figure")
        shown = gr.Textbox(elem_id="shown")  # the figure that the browser shows
        outputs = [view, shown, progress]
        with gr.Row():
            for action in ACTIONS:
                button = gr.Button(f"{action} ({action[0]})", elem_id=f"key-{action[0]}")
                # one at a time: all of them move the one session
                button.click(
                    partial(_act, figures, session, action),
                    shown,
                    outputs,
                    show_progress="hidden",
                    concurrency_id="session",
                    concurrency_limit=1,
                )
        gr.Markdown(RULE)
        page.load(partial(show, figures, session), None, outputs)
    return page


def serve(page: gr.Blocks, port: int | None = None) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C."""
    page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        ssr_mode=False,
        css=CSS,
        head=HEAD,
        footer_links=[],
        run_history=False,
    )


def _act(figures: Figures, session: Session, action: str, shown: str) -> tuple[str, str, str]:
    if action == "back":
        session.back()
    else:
        session.label(shown, action)
    return show(figures, session)


def show(figures: Figures, session: Session) -> tuple[str, str, str]:
    """The current figure as HTML, its sha256 ("" when none is left), and the progress."""
    sha = session.current
    progress = f"### {session.done} of {len(session.order)} labelled by {session.annotator}"
    if sha is None:
        return "<p>All figures are labelled. Close this page and stop the command with Ctrl-C.</p>", "", progress
    if sha in session.labels:
        progress += f", this one as **{session.labels[sha]}**"
    caption = f"<figcaption>{html.escape(figures.caption(sha)) or 'no caption'}</figcaption>"
    return f"<figure>{_image(figures, sha)}{caption}</figure>", sha, progress


def _image(figures: Figures, sha: str) -> str:
    """The figure as PNG, since browsers do not show every format that a source may have."""
    try:
        image = upright_rgb(decode(figures.image(sha)))
    except ValueError as error:  # BadImageError is one
        return f"<p>This figure cannot be read ({html.escape(str(error))}): label it unsure.</p>"
    stream = BytesIO()
    image.save(stream, "PNG")
    return f'<img alt="figure" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'
