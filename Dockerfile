# Both commands in a container, on CPUs; for CUDA, add --build-arg TORCH= to build, and --gpus all to run:
#     docker build --tag chexpert-pipeline . && docker run chexpert-pipeline sh -c "make train && make test"
FROM python:3.11
ARG TORCH=cpu
WORKDIR /chexpert-pipeline
COPY . .
RUN make setup TORCH=$TORCH
CMD ["make", "train"]
