import java.nio.charset.StandardCharsets;
import java.time.Instant;
import java.time.ZoneOffset;
import java.time.format.DateTimeFormatter;
import org.apache.kafka.common.header.Headers;
import org.apache.kafka.common.header.internals.RecordHeaders;

/** Headers of both Kafka Streams programs: those of a raw record as text, those of a canonical event. */
final class EventHeaders {
    static final String TENANT = "lakeshore";
    private static final DateTimeFormatter STAMP =
        DateTimeFormatter.ofPattern("yyyy-MM-dd'T'HH:mm:ss.SSS'Z'").withZone(ZoneOffset.UTC);

    private EventHeaders() {
    }

    static String read(Headers headers, String name) {
        return new String(headers.lastHeader(name).value(), StandardCharsets.UTF_8);
    }

    /** Those of a captured payment; {@code occurred} in milliseconds, {@code received} as the raw record has it. */
    static Headers write(
        String eventId, String account, String facility, long occurred, String received, String version,
        String origin) {
        Headers headers = new RecordHeaders();
        add(headers, "ce_specversion", "1.0");
        add(headers, "ce_id", eventId);
        add(headers, "ce_source", "/" + TENANT + "/stripe/" + account);
        add(headers, "ce_type", "remitstream.payments.capture");
        add(headers, "ce_time", STAMP.format(Instant.ofEpochMilli(occurred)));
        add(headers, "event_id", eventId);
        add(headers, "hop", origin);
        add(headers, "origin", origin);
        add(headers, "ingest_time", received);
        add(headers, "facility", facility);
        add(headers, "mapping_version", version);
        return headers;
    }

    private static void add(Headers headers, String name, String value) {
        headers.add(name, value.getBytes(StandardCharsets.UTF_8));
    }
}
