# The jetson image, arm64: the service on NVIDIA's L4T, whose own CUDA torch uses. BASE is the L4T image of your JetPack (7 or later: Ubuntu 24.04
# with Python 3.12; JetPack 6 has Python 3.10, which is too old) and has no default. A torch built for that CUDA comes from the context `wheels`
# or from TORCH_INDEX. The rest is as in gpu.Dockerfile. Build it on the device, or on an arm64 machine.
ARG BASE

FROM scratch AS wheels

FROM ${BASE} AS builder
COPY docker/install.sh /build/docker/
WORKDIR /build
RUN docker/install.sh packages ca-certificates gcc libc6-dev python3-dev python3-pip python3-venv
COPY pyproject.toml constraints.txt /build/
ARG TORCH=cuda
ARG TORCH_INDEX=""
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/pip-ca.pem \
    docker/install.sh dependencies
COPY setup.py README.md LICENSE /build/
COPY service /build/service
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/pip-ca.pem \
    docker/install.sh project && docker/install.sh strip

FROM ${BASE}
COPY docker/install.sh /tmp/
RUN /tmp/install.sh packages python3 python3-dev gcc libc6-dev tini && rm /tmp/install.sh \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin deepseek \
    && install --directory --owner=10001 --group=10001 /var/cache/deepseek \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=builder /opt/deepseek /opt/deepseek
COPY docker/healthcheck.py /opt/deepseek/healthcheck.py
ENV PATH=/opt/deepseek/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    DEEPSEEK_HOST=0.0.0.0 \
    DEEPSEEK_PORT=8000 \
    DEEPSEEK_QUANTIZE_CACHE=/var/cache/deepseek/weights \
    DEEPSEEK_REGISTRY=/var/cache/deepseek/registry.sqlite \
    DEEPSEEK_TIER=edge \
    TRITON_CACHE_DIR=/var/cache/deepseek/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=all
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 CMD ["python", "-I", "/opt/deepseek/healthcheck.py"]
ENTRYPOINT ["tini", "--", "deepseek-serve"]
