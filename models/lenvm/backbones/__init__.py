"""Backbones: find one (folder, hub id, GGUF or the shipped default), identify it by digest, and load it.

Importing this package needs neither torch nor transformers; only ``load_backbone`` and ``load_tokenizer`` do.
"""

from __future__ import annotations

from lenvm.backbones._files import backbone_sha256, cache_root, check_backbone, tokenizer_sha256, verify_backbone
from lenvm.backbones._loading import encode_chat, load_backbone, load_eos_ids, load_tokenizer
from lenvm.backbones._resolve import DEFAULT_BACKBONE, KNOWN_BACKBONES, KnownBackbone, resolve_backbone

__all__ = [
    "DEFAULT_BACKBONE",
    "KNOWN_BACKBONES",
    "KnownBackbone",
    "backbone_sha256",
    "cache_root",
    "check_backbone",
    "encode_chat",
    "load_backbone",
    "load_eos_ids",
    "load_tokenizer",
    "resolve_backbone",
    "tokenizer_sha256",
    "verify_backbone",
]
