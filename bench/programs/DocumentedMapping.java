import com.fasterxml.jackson.annotation.JsonIgnoreProperties;
import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.PropertyNamingStrategies;
import java.io.ByteArrayOutputStream;
import java.io.File;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.HexFormat;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import org.apache.avro.Schema;
import org.apache.avro.generic.GenericData;
import org.apache.avro.generic.GenericDatumWriter;
import org.apache.avro.generic.GenericRecord;
import org.apache.avro.io.BinaryEncoder;
import org.apache.avro.io.EncoderFactory;
import org.apache.kafka.common.errors.SerializationException;
import org.apache.kafka.common.header.Headers;
import org.apache.kafka.common.serialization.Deserializer;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.serialization.Serializer;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.processor.api.ContextualProcessor;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.processor.api.RecordMetadata;

/**
 * The worker's mapping in Java as users of Kafka Streams write it: the DSL, JSON into objects by Jackson's data binding,
 * Avro's generic records and its own encoder behind the frame of a registry, headers by the Headers API. Arguments: those
 * of {@link Application}, then the file of the schema.
 */
public final class DocumentedMapping {
    private static final Map<String, String> FACILITIES = Map.of("north-card", "north", "harbor-card", "harbor");
    private static final Map<String, String> AUTHORITIES = Map.of("north", "NORTH", "harbor", "HARBOR");
    private static final Map<String, Integer> EXPONENTS = Map.of("USD", 2, "EUR", 2, "JPY", 0);

    public static void main(String[] arguments) throws InterruptedException, IOException {
        Schema schema = new Schema.Parser().parse(new File(arguments[8]));
        Serde<Event> events = Serdes.serdeFrom(
            (topic, event) -> {
                throw new SerializationException("events are only read");
            },
            new JsonDeserializer<>(Event.class));
        Serde<GenericRecord> records = Serdes.serdeFrom(
            new AvroSerializer(schema, Integer.parseInt(arguments[5])),
            (topic, bytes) -> {
                throw new SerializationException("records are only written");
            });
        StreamsBuilder builder = new StreamsBuilder();
        builder.stream(arguments[1], Consumed.with(Serdes.String(), events))
            .process(() -> new Mapper(schema, arguments[4], arguments[6]))
            .to(arguments[2], Produced.with(Serdes.String(), records));
        Application.run(builder.build(), arguments);
    }

    /** A webhook; members nobody maps are left out. */
    @JsonIgnoreProperties(ignoreUnknown = true)
    static final class Event {
        public String id;
        public String type;
        public long created;
        public Data data;
    }

    @JsonIgnoreProperties(ignoreUnknown = true)
    static final class Data {
        public Intent object;
    }

    @JsonIgnoreProperties(ignoreUnknown = true)
    static final class Intent {
        public String id;
        public long amountReceived;
        public String currency;
        public String status;
        public String statementDescriptorSuffix;
        /** An id, or the whole object. */
        public JsonNode paymentMethod;
        public List<String> paymentMethodTypes;
        public Map<String, String> metadata;
    }

    private static final class JsonDeserializer<T> implements Deserializer<T> {
        private final ObjectMapper mapper =
            new ObjectMapper().setPropertyNamingStrategy(PropertyNamingStrategies.SNAKE_CASE);
        private final Class<T> type;

        JsonDeserializer(Class<T> type) {
            this.type = type;
        }

        @Override
        public T deserialize(String topic, byte[] bytes) {
            try {
                return mapper.readValue(bytes, type);
            } catch (IOException error) {
                throw new SerializationException(error);
            }
        }
    }

    /** Frame and body, as a registry's serializer writes them; asking a registry would only cost more. */
    private static final class AvroSerializer implements Serializer<GenericRecord> {
        private final GenericDatumWriter<GenericRecord> writer;
        private final byte[] frame;
        private BinaryEncoder encoder;

        AvroSerializer(Schema schema, int id) {
            writer = new GenericDatumWriter<>(schema);
            frame = ByteBuffer.allocate(5).put((byte) 0).putInt(id).array();
        }

        @Override
        public byte[] serialize(String topic, GenericRecord record) {
            try {
                ByteArrayOutputStream out = new ByteArrayOutputStream(1024);
                out.write(frame);
                encoder = EncoderFactory.get().binaryEncoder(out, encoder);
                writer.write(record, encoder);
                encoder.flush();
                return out.toByteArray();
            } catch (IOException error) {
                throw new SerializationException(error);
            }
        }
    }

    private static final class Mapper extends ContextualProcessor<String, Event, String, GenericRecord> {
        private final Schema schema;
        private final Schema money;
        private final Schema reference;
        private final String topicId;
        private final String version;
        private final MessageDigest digest;

        Mapper(Schema schema, String topicId, String version) {
            this.schema = schema;
            this.money = schema.getField("money").schema();
            this.reference = schema.getField("patient").schema().getTypes().get(1);
            this.topicId = topicId;
            this.version = version;
            try {
                digest = MessageDigest.getInstance("SHA-256");
            } catch (NoSuchAlgorithmException error) {
                throw new IllegalStateException(error);
            }
        }

        @Override
        public void process(Record<String, Event> record) {
            Event event = record.value();
            Intent intent = event.data.object;
            String account = EventHeaders.read(record.headers(), "account");
            String facility = FACILITIES.get(account);
            if (!"payment_intent.succeeded".equals(event.type) || facility == null || intent.amountReceived <= 0
                || !EventHeaders.read(record.headers(), "facility").equals(facility)
                || !EventHeaders.read(record.headers(), "source").equals("stripe")) {
                throw new IllegalStateException("not a payment of a known account");
            }
            String received = EventHeaders.read(record.headers(), "ingest_time");
            RecordMetadata position = context().recordMetadata().orElseThrow();
            String origin = topicId + ":" + position.partition() + ":" + position.offset();
            String key = "stripe:" + account + ":capture:" + intent.id;
            String eventId =
                HexFormat.of().formatHex(digest.digest(key.getBytes(StandardCharsets.UTF_8))).substring(0, 32);
            String root = account + "/" + intent.id;
            String authority = AUTHORITIES.get(facility);
            String named = intent.metadata.getOrDefault("assigning_authority", authority);
            String currency = intent.currency.toUpperCase(Locale.ROOT);
            long occurred = event.created * 1000;

            GenericRecord amount = new GenericData.Record(money);
            amount.put("minor", intent.amountReceived);
            amount.put("currency", currency);
            amount.put("exponent", EXPONENTS.get(currency));
            GenericRecord canonical = new GenericData.Record(schema);
            canonical.put("event_id", eventId);
            canonical.put("transaction_key", key);
            canonical.put("tenant", EventHeaders.TENANT);
            canonical.put("facility", facility);
            canonical.put("source", "stripe");
            canonical.put("account", account);
            canonical.put("kind", "capture");
            canonical.put("status", intent.status);
            canonical.put("money", amount);
            canonical.put("occurred_at", occurred);
            canonical.put("received_at", Long.parseLong(received));
            canonical.put("object_id", intent.id);
            canonical.put("root", root);
            canonical.put("source_event_id", event.id);
            canonical.put("patient", refer(named, "MR", intent.metadata.get("mrn")));
            canonical.put("guarantor_account", refer(authority, "AN", intent.metadata.get("guarantor_account")));
            canonical.put("visit", refer(authority, "VN", intent.metadata.get("visit")));
            canonical.put("claim", intent.metadata.get("claim"));
            canonical.put("invoice", intent.metadata.get("invoice"));
            canonical.put("token_reference", readToken(intent.paymentMethod));
            canonical.put("attributes", readAttributes(intent));
            canonical.put("mapping_version", version);
            canonical.put("origin", origin);

            Headers headers = EventHeaders.write(eventId, account, facility, occurred, received, version, origin);
            context().forward(new Record<>(root, canonical, record.timestamp(), headers));
        }

        private GenericRecord refer(String authority, String idType, String value) {
            if (value == null) {
                return null;
            }
            GenericRecord made = new GenericData.Record(reference);
            made.put("authority", authority);
            made.put("id_type", idType);
            made.put("value", value);
            return made;
        }

        private static String readToken(JsonNode method) {
            if (method == null || method.isNull()) {
                return null;
            }
            return method.isObject() ? method.get("id").asText() : method.asText();
        }

        private static Map<String, String> readAttributes(Intent intent) {
            Map<String, String> attributes = new LinkedHashMap<>();
            if (intent.paymentMethod != null && intent.paymentMethod.isObject()) {
                attributes.put("payment_method_type", intent.paymentMethod.get("type").asText());
            } else if (intent.paymentMethodTypes.size() == 1) {
                attributes.put("payment_method_type", intent.paymentMethodTypes.get(0));
            }
            if (intent.statementDescriptorSuffix != null) {
                attributes.put("statement_descriptor_suffix", intent.statementDescriptorSuffix);
            }
            return attributes;
        }
    }
}
