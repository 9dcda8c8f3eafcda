# smol on a CPU, with the model: docker build -t smol .  (see docs/deployment.md)
#
#   BASE     an image with Python 3.11 or newer and its venv module
#   MODEL    model to put into the image; empty: mount a model store at /var/lib/smol
#   EXTRAS   optional dependencies, such as "parquet" or "ray,parquet"
ARG BASE=docker.io/library/python:3.13-slim

FROM ${BASE} AS build
WORKDIR /src
RUN python3 -m venv /opt/smol && python3 -m venv /opt/build && /opt/build/bin/pip install -q build
# torch and transformers, which only GPUs need, are left out.
ARG EXTRAS=
COPY pyproject.toml constraints.txt ./
COPY tools/slim_requirements.py tools/
RUN python3 tools/slim_requirements.py "${EXTRAS}" > requirements.txt \
    && /opt/smol/bin/pip install --no-cache-dir -c constraints.txt -r requirements.txt
# Without a C compiler in the image, the build hook compiles the kernels with the ziglang package.
COPY README.md LICENSE hatch_build.py ./
COPY tools tools
COPY smolcli smolcli
RUN /opt/build/bin/python -m build --wheel --outdir /wheels . \
    && /opt/smol/bin/pip install --no-cache-dir --no-deps /wheels/*.whl

FROM ${BASE} AS runtime
RUN useradd --uid 10001 --create-home --home-dir /var/lib/smol smol
COPY --from=build /opt/smol /opt/smol
ENV PATH=/opt/smol/bin:$PATH \
    SMOL_HOME=/var/lib/smol \
    SMOL_HOST=0.0.0.0 \
    SMOL_PORT=8000 \
    SMOL_LOG_FORMAT=json
USER 10001:10001
WORKDIR /var/lib/smol

# The first answer packs the weights for this kind of CPU, so that a read-only container maps them.
FROM runtime AS model
ARG MODEL=HuggingFaceTB/SmolLM2-135M-Instruct
RUN mkdir batches; test -z "${MODEL}" \
    || { smol pull "${MODEL}" && smol ask --model "${MODEL}" --max-new-tokens 1 Hello; }

FROM runtime
COPY --from=model --chown=10001:10001 /var/lib/smol /var/lib/smol
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"SMOL_PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["smol"]
CMD ["serve"]
