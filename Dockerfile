# The suite with its command `hap`, for CPU and GPU: the wheels of torch for Linux carry CUDA and run without it.
#   docker build -t hap .
#   docker run --rm -v "$PWD/results:/hap/results" hap run digits digits-bert --again
#   docker run --rm --gpus all -v "$PWD/results:/hap/results" -v "$PWD/data:/hap/data" hap run resnet20-cifar10
# The records of results/ are in the image: without --again those that are there are judged, not made. It has neither the
# tests nor the benchmarks, which are run in a checkout.
# A smaller image for CPU only: --build-arg PIP_INDEX=... with an index that has torch without CUDA.
FROM python:3.12-slim

ARG PIP_INDEX=""
WORKDIR /hap
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY hap hap
RUN pip install --no-cache-dir ${PIP_INDEX:+--extra-index-url "$PIP_INDEX"} -c constraints.txt -e '.[page,cluster,heads,glue]'
COPY paper_figs paper_figs
COPY reproductions reproductions
COPY results results

# records made here carry the hash of the code but no commit: there is no git
ENTRYPOINT ["hap"]
CMD ["--help"]
