// A layer and its experts from C, against recorded outputs; and what goes wrong, in words.
// usage: layer CHECKPOINT LAYER FOLDER TOKENS TOP_K HIDDEN INTERMEDIATE EXPERTS
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe_runner.h"

#define CHECK(condition)                                                                         \
    do {                                                                                         \
        if (!(condition)) {                                                                      \
            fprintf(stderr, "%s:%d: %s does not hold; last error: %s\n", __FILE__, __LINE__,     \
                    #condition, moe_last_error());                                               \
            exit(1);                                                                             \
        }                                                                                        \
    } while (0)

static void *read_file(const char *folder, const char *name, size_t bytes) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL);
    void *data = malloc(bytes);
    CHECK(data != NULL && fread(data, 1, bytes, file) == bytes && fgetc(file) == EOF);
    fclose(file);
    return data;
}

static double nmse(const float *got, const float *want, size_t len) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < len; i++) {
        error += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        norm += (double)want[i] * want[i];
    }
    return error / norm;
}

static int released;
static void release(void *owner) {
    CHECK(owner == &released);
    released++;
}

int main(int argc, char **argv) {
    CHECK(argc == 9);
    const char *path = argv[1], *folder = argv[3];
    size_t index = strtoul(argv[2], NULL, 10), tokens = strtoul(argv[4], NULL, 10);
    size_t top_k = strtoul(argv[5], NULL, 10), hidden = strtoul(argv[6], NULL, 10);
    size_t intermediate = strtoul(argv[7], NULL, 10), count = strtoul(argv[8], NULL, 10);
    size_t len = tokens * hidden;

    CHECK(moe_abi_version() == MOE_ABI_VERSION);
    CHECK(strlen(moe_version()) >= 5);

    float *x = read_file(folder, "x", len * sizeof(float));
    float *want = read_file(folder, "out", len * sizeof(float));
    int32_t *ids = read_file(folder, "ids", tokens * top_k * sizeof(int32_t));
    float *weights = read_file(folder, "weights", tokens * top_k * sizeof(float));
    float *out = malloc(len * sizeof(float));

    // a layer with its router
    moe_checkpoint *checkpoint = NULL;
    CHECK(moe_checkpoint_open(path, &checkpoint) == MOE_STATUS_OK);
    size_t layers[64], found = 0;
    CHECK(moe_checkpoint_layers(checkpoint, layers, 64, &found) == MOE_STATUS_OK);
    CHECK(found == 2 && (layers[0] == index || layers[1] == index));
    moe_layer *layer = NULL;
    moe_options options = {.size = sizeof options, .dtype = MOE_DTYPE_F32, .threads = 2};
    CHECK(moe_layer_open(checkpoint, index, &options, &layer) == MOE_STATUS_OK);
    CHECK(moe_layer_hidden_size(layer) == hidden);
    CHECK(moe_layer_forward(layer, x, tokens, out) == MOE_STATUS_OK);
    CHECK(nmse(out, want, len) < 1e-10);
    // with the recorded routing, and for no token at all
    memset(out, 0, len * sizeof(float));
    CHECK(moe_layer_forward_routed(layer, x, tokens, ids, weights, top_k, out) == MOE_STATUS_OK);
    CHECK(nmse(out, want, len) < 1e-10);
    CHECK(moe_layer_forward(layer, NULL, 0, NULL) == MOE_STATUS_OK);
    CHECK(strstr(moe_layer_explain(layer), "\"chosen\":\"cpu_") != NULL);

    moe_layer_free(layer);

    // its experts as the checkpoint stores them; they outlive it
    moe_experts *experts = NULL;
    CHECK(moe_experts_open(checkpoint, index, &options, &experts) == MOE_STATUS_OK);
    moe_checkpoint_free(checkpoint);
    memset(out, 0, len * sizeof(float));
    CHECK(moe_experts_forward(experts, x, tokens, ids, weights, top_k, out) == MOE_STATUS_OK);
    CHECK(nmse(out, want, len) < 1e-10);
    moe_experts_free(experts);

    // the same in memory of ours
    size_t gate_up_bytes = count * 2 * intermediate * hidden * 2;
    moe_stacked_experts stacks = {
        .size = sizeof stacks,
        .experts = count,
        .hidden = hidden,
        .intermediate = intermediate,
        .dtype = MOE_DTYPE_BF16,
        .layout = MOE_LAYOUT_INTERLEAVED,
        .transposed = true,
        .gate_up = read_file(folder, "gate_up", gate_up_bytes),
        .down = read_file(folder, "down", gate_up_bytes / 2),
        .gate_up_bias = read_file(folder, "gate_up_bias", count * 2 * intermediate * sizeof(float)),
        .down_bias = read_file(folder, "down_bias", count * hidden * sizeof(float)),
        .activation = "clamped_swiglu",
        .alpha = 1.702f,
        .beta = 1.0f,
        .limit = 7.0f,
        .owner = &released,
        .release = release,
    };
    CHECK(moe_experts_from_memory(&stacks, &options, &experts) == MOE_STATUS_OK);
    // they are packed: nothing reads ours any more
    CHECK(released == 1);
    free((void *)stacks.gate_up);
    free((void *)stacks.down);
    memset(out, 0, len * sizeof(float));
    CHECK(moe_experts_forward(experts, x, tokens, ids, weights, top_k, out) == MOE_STATUS_OK);
    CHECK(nmse(out, want, len) < 1e-10);
    CHECK(strstr(moe_experts_explain(experts), "\"rejected\":[") != NULL);

    // what is wrong is said, and harms nothing
    stacks.activation = "tanh";
    moe_experts *none = experts;
    CHECK(moe_experts_from_memory(&stacks, &options, &none) == MOE_STATUS_ARGUMENT);
    CHECK(none == NULL && released == 2);
    CHECK(strstr(moe_last_error(), "'tanh'; there are silu") != NULL);
    stacks.size = 8;
    CHECK(moe_experts_from_memory(&stacks, &options, &none) == MOE_STATUS_ARGUMENT);
    CHECK(released == 2);
    CHECK(moe_checkpoint_open("/nowhere", &checkpoint) == MOE_STATUS_IO && checkpoint == NULL);
    CHECK(strstr(moe_last_error(), "/nowhere") != NULL);
    CHECK(moe_checkpoint_open(NULL, &checkpoint) == MOE_STATUS_ARGUMENT);
    CHECK(moe_layer_open(NULL, 0, NULL, &layer) == MOE_STATUS_ARGUMENT && layer == NULL);
    CHECK(moe_checkpoint_open(path, &checkpoint) == MOE_STATUS_OK);
    CHECK(moe_layer_open(checkpoint, 99, NULL, &layer) == MOE_STATUS_ARGUMENT);
    CHECK(strstr(moe_last_error(), "99 is no MoE layer") != NULL);
    options.kernel = "fastest";
    CHECK(moe_layer_open(checkpoint, index, &options, &layer) == MOE_STATUS_NO_KERNEL);
    options.kernel = NULL;
    options.dtype = 77;
    CHECK(moe_layer_open(checkpoint, index, &options, &layer) == MOE_STATUS_ARGUMENT);
    CHECK(strcmp(moe_last_error(), "options.dtype: 77 is no moe_dtype") == 0);
    CHECK(moe_experts_forward(experts, NULL, tokens, ids, weights, top_k, out) ==
          MOE_STATUS_ARGUMENT);
    CHECK(moe_experts_forward(experts, x, (size_t)-1, ids, weights, top_k, out) ==
          MOE_STATUS_ARGUMENT);
    CHECK(moe_experts_forward(experts, x, tokens, ids, weights, top_k, x) == MOE_STATUS_ARGUMENT);
    CHECK(strstr(moe_last_error(), "overlaps") != NULL);
    CHECK(moe_experts_forward(experts, (char *)x + 1, 1, ids, weights, top_k, out) ==
          MOE_STATUS_ARGUMENT);
    x[0] = NAN;
    CHECK(moe_experts_forward(experts, x, tokens, ids, weights, top_k, out) ==
          MOE_STATUS_ARGUMENT);
    CHECK(strstr(moe_last_error(), "row 0, column 0") != NULL);
    CHECK(moe_layer_hidden_size(NULL) == 0 && moe_layer_explain(NULL) == NULL);

    moe_checkpoint_free(checkpoint);
    moe_checkpoint_free(NULL);
    moe_layer_free(NULL);
    moe_experts_free(NULL);
    moe_experts_free(experts);
    free((void *)stacks.gate_up_bias);
    free((void *)stacks.down_bias);
    free(x);
    free(want);
    free(ids);
    free(weights);
    free(out);
    puts("ok");
    return 0;
}
