"""A small web service around an exported file.

    pip install fastapi uvicorn onnxruntime numpy pillow
    MODEL=run/onnx/model.onnx uvicorn --app-dir examples/serve app:app
    curl --data-binary @photo.jpg http://localhost:8000/classify

An image is the body of a request. THREADS threads compute one answer (0: one for each core); PARALLEL answers are
computed at a time.
"""

import asyncio
import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from classify import Classifier
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image

MAX_BYTES = 10_000_000  # of an upload
MAX_PIXELS = 50_000_000  # of a decoded image: a small file can hold a huge one


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model and answer once before the first request is taken."""
    parallel = int(os.environ.get("PARALLEL", "1"))
    if parallel < 1:  # every request would wait for ever
        raise ValueError(f"PARALLEL={parallel}: expected 1 or more answers at a time")
    classifier = Classifier(Path(os.environ.get("MODEL", "run/onnx/model.onnx")), int(os.environ.get("THREADS", "0")))
    classifier.best(Image.new("RGB", (224, 224)))
    app.state.classifier = classifier
    app.state.turns = asyncio.Semaphore(parallel)
    yield
    app.state.classifier = None  # not ready while the last answers are sent


app = FastAPI(title="growkit classifier", lifespan=lifespan)


@app.get("/ready")
def ready() -> dict[str, bool]:
    """200 once the model has answered; 503 before and when the service ends."""
    if getattr(app.state, "classifier", None) is None:
        raise HTTPException(503, "the model is not loaded")
    return {"ready": True}


@app.post("/classify")
async def classify(request: Request, count: int = 5) -> dict[str, object]:
    """The most likely classes of the image that is the request's body."""
    body = bytearray()
    async for chunk in request.stream():  # counted as it comes: a client may give no length, or a wrong one
        body += chunk
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"an image has at most {MAX_BYTES} bytes")
    async with app.state.turns:
        return {"best": await run_in_threadpool(answer, bytes(body), max(1, count))}


def answer(body: bytes, count: int) -> list[dict[str, object]]:
    """Decode and classify, in a thread of its own."""
    try:
        image = Image.open(io.BytesIO(body))
        if image.width * image.height > MAX_PIXELS:
            raise HTTPException(413, f"an image has at most {MAX_PIXELS} pixels")
        image.load()
    except HTTPException:
        raise
    except Exception as error:  # Pillow raises whatever a broken file leads it to
        raise HTTPException(400, f"not a readable image: {type(error).__name__}") from None
    return app.state.classifier.best(image, count)
