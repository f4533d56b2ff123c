"""Examples of the OpenAPI document; a test sends the requests and checks the answers' form."""

from __future__ import annotations

from typing import Any

__all__ = ["ERROR_EXAMPLE", "REQUEST_EXAMPLES", "RESPONSE_EXAMPLES"]

_SHA = "9f2c4e1ab07d55a3"
_HANDLE = "s1.0b9d6c0e4f6c5d1e8a7b3c2d1f0e9a8b"
_HEAD: dict[str, Any] = {"model": "smollm2-135m-instruct", "model_sha": _SHA, "gamma": 0.997, "cap": 2048}
_TIMINGS: dict[str, Any] = {"queue": 0.4, "inference": 38.1, "total": 39.9}

ERROR_EXAMPLE: dict[str, Any] = {
    "message": "one line that says what to do",
    "param": None,
    "request_id": "5f0c1b9a4d3e4c0f9a6f0a1b2c3d4e5f",
}

REQUEST_EXAMPLES: dict[str, dict[str, Any]] = {
    "/predict_length": {
        "flat": {"summary": "One prompt", "value": {"prompt": "Name three colours.", "max_tokens": 128}},
        "batch": {
            "summary": "Several prefixes",
            "value": {
                "inputs": [
                    {"messages": [{"role": "user", "content": "Tell me a story about the sea."}]},
                    {"token_ids": [1, 4093, 198, 28120], "generated": 2},
                ],
                "quantiles": [0.5, 0.9],
                "deadline_ms": 60000,
            },
        },
        "models": {
            "summary": "One prompt, several models",
            "value": {"prompt": "Name three colours.", "models": ["smollm2-135m-instruct", "another-model"]},
        },
    },
    "/score": {
        "tokens": {
            "summary": "A completion, token by token",
            "value": {"prompt": "Name a colour.", "completion": "Blue, like the sea.", "eos": True},
        },
        "candidates": {
            "summary": "Candidates for the next token",
            "value": {
                "inputs": [
                    {
                        "token_ids": [1, 4093, 198, 28120],
                        "candidates": [2, 28, 30],
                        "generated": 12,
                        "objective": {"kind": "equal_to", "target": 40},
                    }
                ]
            },
        },
        "step": {
            "summary": "A decoding step, as columns",
            "value": {
                "columns": {
                    "session": [_HANDLE, _HANDLE],
                    "append": [[28], [30]],
                    "candidates": [[2, 28, 30], [2, 198]],
                    "generated": [13, 13],
                    "objective": {"kind": "equal_to", "target": 40},
                }
            },
        },
    },
    "/tokenize": {"prompt": {"summary": "A prompt", "value": {"prompt": "Name three colours."}}},
    "/detokenize": {"ids": {"summary": "Ids", "value": {"token_ids": [4093, 198]}}},
    "/feedback": {
        "stop": {
            "summary": "An answer that ended by itself",
            "value": {"items": [{"prediction_id": _HANDLE, "generated_tokens": 87, "finish_reason": "stop"}]},
        }
    },
}

RESPONSE_EXAMPLES: dict[str, Any] = {
    "/predict_length": {
        **_HEAD,
        "predictions": [
            {
                "index": 0,
                "prompt_tokens": 34,
                "cached_tokens": 0,
                "value": -0.1312,
                "horizon": 46.8,
                "mean": 61.3,
                "quantiles": {"0.5": 44, "0.9": 131, "0.95": 178},
                "p_exceeds_max_tokens": 0.1042,
                "rank_key": 61.3,
                "saturated": False,
                "session": _HANDLE,
                "prediction_id": _HANDLE,
            }
        ],
        "warnings": [],
        "timings_ms": _TIMINGS,
    },
    "/score": {
        **_HEAD,
        "scores": [
            {
                "index": 0,
                "prefix_tokens": 4,
                "cached_tokens": 0,
                "value": -0.0725,
                "horizon": 25.1,
                "values": [0.0, -0.0717, -0.0688],
                "horizons": [0.0, 24.8, 23.7],
                "log_weights": [-14.0, -1.21, -1.34],
                "session": _HANDLE,
                "objective": None,
            }
        ],
        "warnings": [],
        "timings_ms": _TIMINGS,
    },
    "/tokenize": {"model": "smollm2-135m-instruct", "token_ids": [1, 4093, 198]},
    "/detokenize": {"model": "smollm2-135m-instruct", "text": "user\n"},
    "/feedback": {"accepted": 1, "results": [{"index": 0, "accepted": True}]},
}
