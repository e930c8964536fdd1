# A machine with NVIDIA GPUs needs only its driver and the container toolkit:
#   docker build -t moetrain . && docker run --gpus all --shm-size 8g -v "$PWD/runs:/moetrain/runs" moetrain train.steps=300
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv gcc git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /moetrain
COPY . .
ENV MOETRAIN_VENV=/opt/moetrain MOETRAIN_CACHE=/moetrain/runs/cache
RUN scripts/setup.sh
ENTRYPOINT ["scripts/train.sh"]
