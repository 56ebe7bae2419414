// An NVTX tool as small as can be: it writes what a process annotates, a line for each call, with tabs between fields.
//
//     domain    HANDLE NAME
//     category  HANDLE ID NAME
//     schema    HANDLE ID NAME:TYPE:OFFSET …
//     push      HANDLE THREAD CATEGORY COLOR SCHEMA BYTES-IN-HEX MESSAGE
//     pop       HANDLE THREAD
//
// NVTX loads it from NVTX_INJECTION64_PATH and calls InitializeInjectionNvtx2 for the core functions, of which those of
// domains are module 5, and InitializeInjectionNvtxExtension for each extension, of which structured payloads are
// module 2. Structs and numbers are those of NVIDIA's nvtxTypes.h, nvToolsExt.h and nvToolsExtPayload.h (NVTX 3).
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CORE2 = 5, PUSH = 4, POP = 5, NAME_CATEGORY = 8, REGISTER_STRING = 10, CREATE_DOMAIN = 12 };
enum { CALLBACKS = 1, PAYLOAD_EXTENSION = 2, REGISTER_SCHEMA = 0 };
enum { REGISTERED_MESSAGE = 3 };
#define EXTENDED_PAYLOAD ((int32_t)0xDFBD0009)

typedef void (*Function)(void);
typedef struct { size_t size; int (*table)(int module, Function ***slots, unsigned *count); } Callbacks;
typedef struct { size_t id, count; intptr_t *slots; } Segment;
typedef struct {
    uint16_t version, size, module, compatible;
    size_t segments_count;
    Segment *segments;
} Extension;
typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, payload_count;
    uint64_t payload;
    int32_t message_type;
    const void *message;
} Event;
typedef struct { uint64_t schema; size_t size; const unsigned char *bytes; } Payload;
typedef struct {
    uint64_t flags, type;
    const char *name, *description;
    uint64_t detail, offset;
    const void *semantics, *reserved;
} Entry;
typedef struct {
    uint64_t fields;
    const char *name;
    uint64_t type, flags;
    const Entry *entries;
    size_t count;
} Schema;

static FILE *out;

static void *create_domain(const char *name) {
    char *handle = strdup(name);
    fprintf(out, "domain\t%p\t%s\n", (void *)handle, name);
    return handle;
}

static void name_category(void *domain, uint32_t id, const char *name) {
    fprintf(out, "category\t%p\t%u\t%s\n", domain, id, name);
}

static void *register_string(void *domain, const char *text) { return strdup(text); }

static int push(void *domain, const Event *event) {
    char bytes[513] = "";
    const Payload *payload = NULL;
    if (event->payload_type == EXTENDED_PAYLOAD && event->payload_count == 1) {
        payload = (const Payload *)(uintptr_t)event->payload;
        for (size_t i = 0; i < payload->size && i < 256; i++) sprintf(bytes + 2 * i, "%02x", payload->bytes[i]);
    }
    fprintf(out, "push\t%p\t%ld\t%u\t%08x\t%llu\t%s\t%s\n", domain, syscall(SYS_gettid), event->category, event->color,
            payload ? (unsigned long long)payload->schema : 0ull, bytes,
            event->message_type == REGISTERED_MESSAGE ? (const char *)event->message : "(not registered)");
    return 0;
}

static int pop(void *domain) {
    fprintf(out, "pop\t%p\t%ld\n", domain, syscall(SYS_gettid));
    return 0;
}

static uint64_t register_schema(void *domain, const Schema *schema) {
    static uint64_t last = 1ull << 32;
    fprintf(out, "schema\t%p\t%llu\t", domain, (unsigned long long)++last);
    for (size_t i = 0; i < schema->count; i++)
        fprintf(out, "%s%s:%llu:%llu", i ? " " : "", schema->entries[i].name,
                (unsigned long long)schema->entries[i].type, (unsigned long long)schema->entries[i].offset);
    fprintf(out, "\n");
    return last;
}

int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t)) {
    const Callbacks *callbacks = export_table(CALLBACKS);
    Function **slots;
    unsigned count;
    const char *place = getenv("NVTX_RECORD");
    if (!callbacks || !place || !callbacks->table(CORE2, &slots, &count) || count <= CREATE_DOMAIN) return 0;
    if (!(out = fopen(place, "a"))) return 0;
    setvbuf(out, NULL, _IOLBF, 0);
    *slots[CREATE_DOMAIN] = (Function)create_domain;
    *slots[NAME_CATEGORY] = (Function)name_category;
    *slots[REGISTER_STRING] = (Function)register_string;
    *slots[PUSH] = (Function)push;
    *slots[POP] = (Function)pop;
    return 1;
}

int InitializeInjectionNvtxExtension(Extension *extension) {
    if (extension->module != PAYLOAD_EXTENSION) return 0;
    extension->segments[0].slots[REGISTER_SCHEMA] = (intptr_t)register_schema;
    return 1;
}
