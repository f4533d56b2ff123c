# The service for GPUs; it runs on CPUs too (`--device cpu`, the default):
#     docker build -t lenvm .
# For CPUs, without torch, to serve what `lenvm export` wrote:
#     docker build --build-arg EXTRA=onnx -t lenvm:onnx .
# The entry point is `lenvm`: `docker run -v lenvm-cache:/cache lenvm predict "Hi"` works as well. docs/deploy.md has the rest.
ARG PYTHON_VERSION=3.11
ARG EXTRA=serve

# -- what Python needs, without the project: a change of the sources leaves this layer as it is -------------------------
FROM python:${PYTHON_VERSION}-slim-bookworm AS dependencies
ARG EXTRA
ENV PATH=/opt/lenvm/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt deploy/requirements.py ./
# torch as the registry has it for Linux brings CUDA's libraries along; the driver is the host's.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/lenvm \
    && python requirements.py "$EXTRA" otel > requirements.txt \
    && pip install --compile -c constraints.txt -r requirements.txt

# -- the wheel ----------------------------------------------------------------------------------------------------------
FROM python:${PYTHON_VERSION}-slim-bookworm AS wheel
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /wheels .

# -- what each kind of image has beside Python --------------------------------------------------------------------------
FROM python:${PYTHON_VERSION}-slim-bookworm AS runtime-serve
# Triton compiles the launchers of our kernels with it, on a GPU, when they are first used.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM python:${PYTHON_VERSION}-slim-bookworm AS runtime-onnx
ENV LENVM_MODEL=/models/export

# -- the image ----------------------------------------------------------------------------------------------------------
# hadolint ignore=DL3006
FROM runtime-${EXTRA}
RUN useradd --uid 10001 --create-home lenvm && install -d -o lenvm -g lenvm /cache /models
COPY --from=dependencies /opt/lenvm /opt/lenvm
COPY --chmod=755 deploy/probe.py /usr/local/bin/lenvm-probe
# Code that is compiled at run time goes into the volume too: /tmp may be mounted without leave to execute.
ENV PATH=/opt/lenvm/bin:$PATH PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    LENVM_HOST=0.0.0.0 LENVM_CACHE=/cache HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl
# By number: Kubernetes cannot tell that a name is not root's.
USER 10001:10001
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s --retries=3 CMD ["lenvm-probe", "/health/live"]
ENTRYPOINT ["lenvm"]
CMD ["serve"]
