# The service: `docker build -t lenvm .`, then `docker run -p 8000:8000 -v lenvm-cache:/cache lenvm`; any other command of lenvm
# works too: `docker run -v lenvm-cache:/cache lenvm predict "Hi"`.
# One image for CPU and GPU: constraints.txt pins the PyTorch version, and the registry's Linux build of it carries CUDA, so
# the image is large. Separate CPU and GPU stages come with a later release. Not built in CI: no Docker engine there.
FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:3.11-slim
COPY --from=build /wheels /wheels
COPY constraints.txt /wheels/
RUN pip install --no-cache-dir -c /wheels/constraints.txt "$(ls /wheels/lenvm-*.whl)[serve]" \
 && useradd --create-home lenvm && install -d -o lenvm /cache
USER lenvm
ENV LENVM_CACHE=/cache PYTHONUNBUFFERED=1
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["lenvm"]
CMD ["serve", "--host", "0.0.0.0"]
