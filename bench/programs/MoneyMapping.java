import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonToken;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.LinkedHashMap;
import java.util.Locale;
import java.util.Map;
import org.apache.kafka.common.header.Headers;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.processor.api.RecordMetadata;

/**
 * The worker's mapping in Java, as fast as is reasonable: a streaming JSON parser, Avro bytes written by hand.
 * Arguments: those of {@link Application}.
 */
public final class MoneyMapping {
    private static final Map<String, String[]> ACCOUNTS =
        Map.of("north-card", new String[] {"north", "NORTH"}, "harbor-card", new String[] {"harbor", "HARBOR"});
    private static final Map<String, Integer> EXPONENTS = Map.of("USD", 2, "EUR", 2, "JPY", 0);

    public static void main(String[] arguments) throws InterruptedException {
        Topology topology = new Topology();
        topology.addSource("raw", new ByteArrayDeserializer(), new ByteArrayDeserializer(), arguments[1]);
        topology.addProcessor(
            "map", () -> new Mapper(arguments[4], Integer.parseInt(arguments[5]), arguments[6]), "raw");
        topology.addSink("canonical", arguments[2], new ByteArraySerializer(), new ByteArraySerializer(), "map");
        Application.run(topology, arguments);
    }

    private static final class Mapper implements Processor<byte[], byte[], byte[], byte[]> {
        private final JsonFactory json = new JsonFactory();
        private final HexFormat hex = HexFormat.of();
        private final Output out = new Output();
        private final String topicId;
        private final int schemaId;
        private final String version;
        private final MessageDigest digest;
        private ProcessorContext<byte[], byte[]> context;

        private String type;
        private String sourceEventId;
        private long created;
        private String intent;
        private long minor;
        private String currency;
        private String status;
        private String token;
        private String onlyMethod;
        private String usedMethod;
        private String suffix;
        private String patient;
        private String authority;
        private String visit;
        private String guarantor;
        private String invoice;
        private String claim;

        Mapper(String topicId, int schemaId, String version) {
            this.topicId = topicId;
            this.schemaId = schemaId;
            this.version = version;
            try {
                digest = MessageDigest.getInstance("SHA-256");
            } catch (NoSuchAlgorithmException error) {
                throw new IllegalStateException(error);
            }
        }

        @Override
        public void init(ProcessorContext<byte[], byte[]> given) {
            context = given;
        }

        @Override
        public void process(Record<byte[], byte[]> record) {
            try {
                map(record);
            } catch (IOException error) {
                throw new IllegalStateException(error);
            }
        }

        private void map(Record<byte[], byte[]> record) throws IOException {
            read(record.value());
            Headers given = record.headers();
            String account = EventHeaders.read(given, "account");
            String[] place = ACCOUNTS.get(account);
            if (!"payment_intent.succeeded".equals(type) || place == null || minor <= 0
                || !EventHeaders.read(given, "facility").equals(place[0])
                || !EventHeaders.read(given, "source").equals("stripe")) {
                throw new IllegalStateException("not a payment of a known account");
            }
            String facility = place[0];
            String named = authority == null ? place[1] : authority;
            String received = EventHeaders.read(given, "ingest_time");
            RecordMetadata position = context.recordMetadata().orElseThrow();
            String origin = topicId + ":" + position.partition() + ":" + position.offset();
            String key = "stripe:" + account + ":capture:" + intent;
            String eventId = hex.formatHex(digest.digest(key.getBytes(StandardCharsets.UTF_8)), 0, 16);
            String root = account + "/" + intent;
            String code = currency.toUpperCase(Locale.ROOT);
            long occurred = created * 1000;
            Map<String, String> attributes = new LinkedHashMap<>();
            String method = usedMethod != null ? usedMethod : onlyMethod;
            if (method != null) {
                attributes.put("payment_method_type", method);
            }
            if (suffix != null) {
                attributes.put("statement_descriptor_suffix", suffix);
            }

            out.begin(schemaId);
            out.text(eventId);
            out.text(key);
            out.text(EventHeaders.TENANT);
            out.text(facility);
            out.text("stripe");
            out.text(account);
            out.text("capture");
            out.text(status);
            out.number(minor);
            out.text(code);
            out.number(EXPONENTS.get(code));
            out.number(occurred);
            out.number(Long.parseLong(received));
            out.text(intent);
            out.text(root);
            out.text(sourceEventId);
            out.reference(named, "MR", patient);
            out.number(0);
            out.reference(place[1], "AN", guarantor);
            out.reference(place[1], "VN", visit);
            out.optional(claim);
            out.optional(invoice);
            out.optional(token);
            if (!attributes.isEmpty()) {
                out.number(attributes.size());
                attributes.forEach((name, value) -> {
                    out.text(name);
                    out.text(value);
                });
            }
            out.number(0);
            out.text(version);
            out.text(origin);

            Headers headers = EventHeaders.write(eventId, account, facility, occurred, received, version, origin);
            context.forward(new Record<>(
                root.getBytes(StandardCharsets.UTF_8), out.take(), record.timestamp(), headers));
        }

        private void read(byte[] body) throws IOException {
            type = sourceEventId = intent = currency = status = token = onlyMethod = usedMethod = suffix = null;
            patient = authority = visit = guarantor = invoice = claim = null;
            created = minor = 0;
            try (JsonParser parser = json.createParser(body)) {
                parser.nextToken();
                while (parser.nextToken() == JsonToken.FIELD_NAME) {
                    String name = parser.currentName();
                    JsonToken value = parser.nextToken();
                    switch (name) {
                        case "type" -> type = parser.getText();
                        case "id" -> sourceEventId = parser.getText();
                        case "created" -> created = parser.getLongValue();
                        case "data" -> readData(parser);
                        default -> skip(parser, value);
                    }
                }
            }
        }

        private void readData(JsonParser parser) throws IOException {
            while (parser.nextToken() == JsonToken.FIELD_NAME) {
                String name = parser.currentName();
                JsonToken value = parser.nextToken();
                if (name.equals("object")) {
                    readIntent(parser);
                } else {
                    skip(parser, value);
                }
            }
        }

        private void readIntent(JsonParser parser) throws IOException {
            while (parser.nextToken() == JsonToken.FIELD_NAME) {
                String name = parser.currentName();
                JsonToken value = parser.nextToken();
                switch (name) {
                    case "id" -> intent = parser.getText();
                    case "amount_received" -> minor = parser.getLongValue();
                    case "currency" -> currency = parser.getText();
                    case "status" -> status = parser.getText();
                    case "statement_descriptor_suffix" -> suffix = orNull(parser, value);
                    case "payment_method" -> readMethod(parser, value);
                    case "payment_method_types" -> readTypes(parser);
                    case "metadata" -> readMetadata(parser);
                    default -> skip(parser, value);
                }
            }
        }

        private void readMethod(JsonParser parser, JsonToken value) throws IOException {
            if (value != JsonToken.START_OBJECT) {
                token = orNull(parser, value);
                return;
            }
            while (parser.nextToken() == JsonToken.FIELD_NAME) {
                String name = parser.currentName();
                JsonToken member = parser.nextToken();
                switch (name) {
                    case "id" -> token = parser.getText();
                    case "type" -> usedMethod = parser.getText();
                    default -> skip(parser, member);
                }
            }
        }

        private void readTypes(JsonParser parser) throws IOException {
            int count = 0;
            while (parser.nextToken() != JsonToken.END_ARRAY) {
                onlyMethod = ++count == 1 ? parser.getText() : null;
            }
        }

        private void readMetadata(JsonParser parser) throws IOException {
            while (parser.nextToken() == JsonToken.FIELD_NAME) {
                String name = parser.currentName();
                JsonToken value = parser.nextToken();
                switch (name) {
                    case "mrn" -> patient = orNull(parser, value);
                    case "assigning_authority" -> authority = orNull(parser, value);
                    case "visit" -> visit = orNull(parser, value);
                    case "guarantor_account" -> guarantor = orNull(parser, value);
                    case "invoice" -> invoice = orNull(parser, value);
                    case "claim" -> claim = orNull(parser, value);
                    default -> skip(parser, value);
                }
            }
        }

        private static String orNull(JsonParser parser, JsonToken value) throws IOException {
            return value == JsonToken.VALUE_NULL ? null : parser.getText();
        }

        private static void skip(JsonParser parser, JsonToken value) throws IOException {
            if (value.isStructStart()) {
                parser.skipChildren();
            }
        }
    }

    /** Avro binary encoding into a buffer that is used again. */
    private static final class Output {
        private byte[] bytes = new byte[2048];
        private int length;

        void begin(int schemaId) {
            length = 5;
            ByteBuffer.wrap(bytes).put((byte) 0).putInt(schemaId);
        }

        void number(long value) {
            ensure(10);
            long rest = (value << 1) ^ (value >> 63);
            while ((rest & ~0x7FL) != 0) {
                bytes[length++] = (byte) ((rest & 0x7F) | 0x80);
                rest >>>= 7;
            }
            bytes[length++] = (byte) rest;
        }

        void text(String value) {
            byte[] coded = value.getBytes(StandardCharsets.UTF_8);
            number(coded.length);
            ensure(coded.length);
            System.arraycopy(coded, 0, bytes, length, coded.length);
            length += coded.length;
        }

        void optional(String value) {
            number(value == null ? 0 : 1);
            if (value != null) {
                text(value);
            }
        }

        void reference(String authority, String idType, String value) {
            number(value == null ? 0 : 1);
            if (value != null) {
                text(authority);
                text(idType);
                text(value);
            }
        }

        byte[] take() {
            return Arrays.copyOf(bytes, length);
        }

        private void ensure(int more) {
            if (length + more > bytes.length) {
                bytes = Arrays.copyOf(bytes, Math.max(bytes.length * 2, length + more));
            }
        }
    }
}
