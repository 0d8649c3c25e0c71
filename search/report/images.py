"""Figures of a search's report as PNG images."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from search.report.figures import Drawn
from space import InputError


def write_images(folder: Path, drawn: Sequence[Drawn], width: int = 1200) -> list[Path]:
    """Write each figure as a PNG, named after it.

    Args:
        folder: of the files; made if it is missing.
        drawn: the figures.
        width: half of the images' width in pixels.

    Returns:
        The files.

    Raises:
        InputError: kaleido or a browser is missing, or the browser does not start.
    """
    if find_spec("kaleido") is None:
        raise InputError("--png: kaleido is not installed; `pip install 'formfit[report]'` installs it")
    import kaleido
    from kaleido.errors import BrowserFailedError, ChromeNotFoundError

    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for one in drawn:
        title = {"text": f"<b>{one.title}</b>", "x": 0, "y": 1, "yanchor": "top", "pad": {"t": 24, "l": 20}}
        figure = one.figure.update_layout(
            title=title,
            margin={"l": 20, "r": 30, "t": 110, "b": 20},
            font={"size": 17},
            showlegend=True,
            legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.01, "yanchor": "bottom"},
        )
        figure.update_xaxes(title_font_size=18).update_yaxes(title_font_size=18)
        figure.update_annotations(font_size=16)
        size = {"format": "png", "width": width, "height": round(1.35 * figure.layout.height), "scale": 2}
        items.append({"fig": figure, "path": str(folder / f"{one.name}.png"), "opts": size})
    try:  # without mathjax, which kaleido would download
        kaleido.write_fig_from_object_sync(items, cancel_on_error=True, kopts={"mathjax": False})
    except ChromeNotFoundError:
        raise InputError(
            "--png: no Chrome or Chromium was found; install one, or `kaleido_get_chrome` does, "
            "or name it in BROWSER_PATH"
        ) from None
    except BrowserFailedError as error:
        raise InputError(f"--png: the browser did not start ({' '.join(map(str, error.args))})") from None
    return [Path(item["path"]) for item in items]
