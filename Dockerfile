# One image for every service; its first argument says which: docker run IMAGE expert --experts '*:3'
# How to build it with your own certificates, index, wheels or CUDA: docs/containers.md.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv --without-pip /opt/expertmesh
COPY constraints.txt ./
# A wheel of torch in wheels/ comes first. `ca` and `pipconf` are secrets that may be given; the image keeps neither.
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt,mode=0444 \
    --mount=type=secret,id=pipconf,target=/etc/pip.conf,mode=0444 \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=wheels,target=/wheels \
    set -- /wheels/torch-*.whl; \
    [ -e "$1" ] || set -- torch --extra-index-url "$TORCH_INDEX_URL"; \
    pip --python /opt/expertmesh/bin/python install -c constraints.txt "$@"
COPY pyproject.toml ./
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt,mode=0444 \
    --mount=type=secret,id=pipconf,target=/etc/pip.conf,mode=0444 \
    --mount=type=cache,target=/root/.cache/pip \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip --python /opt/expertmesh/bin/python install -c constraints.txt -r requirements.txt
COPY README.md LICENSE ./
COPY expertmesh expertmesh
COPY inference inference
COPY services services
# Serving needs none of torch's headers, tests and tools but one: 130 MB less.
RUN pip --python /opt/expertmesh/bin/python install --no-deps --no-build-isolation --no-index . \
    && cd /opt/expertmesh/lib/python*/site-packages/torch && rm -rf include test \
    && find bin -type f ! -name torch_shm_manager -delete \
    && /opt/expertmesh/bin/python -P -c 'import services.full_model.__main__'

FROM ${BASE_IMAGE}
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin expertmesh
COPY --from=build /opt/expertmesh /opt/expertmesh
WORKDIR /app
COPY models models
ENV PATH=/opt/expertmesh/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    MALLOC_ARENA_MAX=2 \
    EXPERTMESH_LISTEN=0.0.0.0:50051 \
    EXPERTMESH_METRICS=0.0.0.0:9090 \
    EXPERTMESH_HTTP=0.0.0.0:8080
USER expertmesh
EXPOSE 50051 8080 9090
HEALTHCHECK --interval=10s --timeout=10s --start-period=120s \
    CMD ["python", "-P", "-m", "expertmesh.rpc.probe", "127.0.0.1:50051"]
ENTRYPOINT ["python", "-P", "-m", "services"]
