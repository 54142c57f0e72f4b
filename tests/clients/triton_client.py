"""tritonclient: ModelInfer, and many requests in one ModelStreamInfer."""

from __future__ import annotations

import json
import queue
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

settings = json.loads(sys.argv[1])
MODEL, EXPECTED = settings["model"], settings["expected"]
SAMPLING = {"temperature": 0, "max_tokens": settings["max_tokens"]}
TIMEOUT_SECONDS = 60


def inputs(stream: bool, **sampling: object) -> list[triton.InferInput]:
    given = {
        "text_input": ("BYTES", np.array([settings["prompt"].encode()], np.object_)),
        "stream": ("BOOL", np.array([stream])),
        "exclude_input_in_output": ("BOOL", np.array([True])),
        "sampling_parameters": ("BYTES", np.array([json.dumps(SAMPLING | sampling).encode()], np.object_)),
    }
    tensors = []
    for name, (datatype, value) in given.items():
        tensors.append(triton.InferInput(name, [1], datatype))
        tensors[-1].set_data_from_numpy(value)
    return tensors


def text(result: triton.InferResult) -> str:
    output = result.as_numpy("text_output")
    return "" if output is None else output[0].decode()


def check_streams(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[tuple[triton.InferResult, InferenceServerException | None]] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    pending = {str(index): "" for index in range(4)}
    for request_id in pending:
        client.async_stream_infer(
            MODEL, inputs(True), request_id=request_id, enable_empty_final_response=request_id == "0"
        )
    texts = {}
    while pending:
        result, error = answers.get(timeout=TIMEOUT_SECONDS)
        assert error is None, error
        response = result.get_response()
        pending[response.id] += text(result)
        if response.parameters["triton_final_response"].bool_param:
            texts[response.id] = pending.pop(response.id)
    assert set(texts.values()) == {EXPECTED}, texts
    client.async_stream_infer(MODEL, inputs(True, temperature=-1))
    _, error = answers.get(timeout=TIMEOUT_SECONDS)
    assert error is not None
    assert "temperature" in str(error), error
    client.stop_stream()


with triton.InferenceServerClient(settings["target"]) as client:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert [tensor.name for tensor in client.get_model_metadata(MODEL).outputs] == ["text_output"]
    assert text(client.infer(MODEL, inputs(False))) == EXPECTED
    try:
        client.infer(MODEL, inputs(False, top_p=2))
        raise AssertionError("top_p 2 was served")
    except InferenceServerException as error:
        status, said = error.status(), str(error)
    assert status == "StatusCode.INVALID_ARGUMENT", status
    assert "top_p" in said, said
    check_streams(client)
