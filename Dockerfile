# The image of all our processes; the command names the process: `receive`, `listen`, `worker`, `project`, `deliver`.
FROM python:3.11-slim AS build
WORKDIR /source
RUN python -m venv /opt/remitstream
ENV PATH=/opt/remitstream/bin:$PATH
COPY requirements.lock .
RUN pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.lock
COPY . .
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation .

FROM python:3.11-slim
# The user that runs `docker compose`, so that it can read the files of its secrets.
ARG USER_ID=1000
RUN useradd --uid "$USER_ID" --non-unique --no-create-home remitstream \
 && mkdir --parents /var/lib/remitstream /etc/remitstream \
 && chown remitstream /var/lib/remitstream
COPY --from=build /opt/remitstream /opt/remitstream
ENV PATH=/opt/remitstream/bin:$PATH
WORKDIR /var/lib/remitstream
USER remitstream
ENTRYPOINT ["remitstream"]
CMD ["--help"]
