# One image for every part of a deployment (docker-compose.yml); the target `gate` is nginx with this deployment's rules.
#
#   docker build --target app -t fedstrata .
#   docker build --target app -t fedstrata:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#
# BASE can name a digest (python@sha256:…) or a mirror; every package is pinned in .docker/requirements.txt,
# and a build fails where pyproject.toml asks for another version.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS gate
RUN apt-get update && apt-get install --yes --no-install-recommends nginx-light && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 49999 fedstrata && useradd --uid 49999 --gid 49999 --no-create-home fedstrata
COPY .docker/gate.conf /etc/nginx/nginx.conf
USER 49999:49999
EXPOSE 8443
CMD ["nginx", "-e", "stderr", "-g", "daemon off;"]

FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv /opt/fedstrata
ENV PATH=/opt/fedstrata/bin:$PATH
COPY .docker/requirements.txt ./
# dependencies first: a change of the code does not install them again; torch first: it alone comes from TORCH_INDEX
RUN pip install --constraint requirements.txt --extra-index-url "${TORCH_INDEX}" torch \
    && pip install --requirement requirements.txt
COPY . .
RUN pip wheel --no-deps --wheel-dir /dist . && pip install --no-deps /dist/*.whl && pip check && pip uninstall --yes pip

FROM ${BASE} AS app
# Volumes take over the owner of the folder that they are mounted on, so the folders are here.
RUN groupadd --gid 49999 fedstrata && useradd --uid 49999 --gid 49999 --home-dir /state --no-create-home fedstrata \
    && for place in ca gate server client-0 client-1 client-2 client-3 client-4 client-5 client-6 client-7; do \
         mkdir -p "/keys/$place" "/data/$place"; done \
    && mkdir -p /state /runs && chown -R 49999:49999 /keys /data /state /runs
COPY --from=build /opt/fedstrata /opt/fedstrata
ENV PATH=/opt/fedstrata/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/state FLWR_HOME=/state/flwr \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 MPLCONFIGDIR=/tmp/matplotlib OMP_NUM_THREADS=1
USER 49999:49999
WORKDIR /state
ENTRYPOINT ["fedstrata"]
CMD ["--help"]
