# The web service and its page on a CPU, without root and without anything that compiles.
#
#   docker build -t fer_nbdev .
#   docker run --rm -p 8000:8000 --read-only --tmpfs /tmp --cap-drop ALL fer_nbdev
#   docker run --rm -p 8000:8000 -e FER_TOKENS=a-token-of-16-or-more fer_nbdev
#
# EXTRA=serve brings API and page. One process serves; for more, start more containers.

FROM python:3.12-slim AS build
ARG EXTRA=serve
WORKDIR /src
COPY setup.py settings.ini README.md MANIFEST.in LICENSE pyproject.toml ./
COPY fer_nbdev fer_nbdev
# opencv-python-headless is the same OpenCV without windows: it needs none of the desktop's libraries
RUN python -m venv /opt/fer \
 && /opt/fer/bin/pip install --no-cache-dir ".[${EXTRA}]" \
 && /opt/fer/bin/pip uninstall -y opencv-python \
 && /opt/fer/bin/pip install --no-cache-dir "opencv-python-headless>=4.10,<5" \
 && find /opt/fer -name "__pycache__" -prune -exec rm -rf {} +

FROM python:3.12-slim
RUN useradd --create-home --uid 1000 fer
COPY --from=build /opt/fer /opt/fer
ENV PATH=/opt/fer/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp/matplotlib ORT_DISABLE_TELEMETRY=1
USER fer
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["fer", "serve", "--host", "0.0.0.0", "--port", "8000"]
