// The mixture-of-experts layer of language models: moe-runner behind a C ABI.
//
// - Every function that can fail returns a moe_status; moe_last_error() says, in words, what is
//   wrong, where, and what to do. No panic leaves the library.
// - Handles may be used from any thread; calls on one handle take turns.
// - Structs begin with their size, so that they can grow: set it to sizeof, and the rest to zero.
// - Rows are contiguous; weights are read once, while a handle is made, unless a kernel is named that
//   reads them in place.
//
// This file is written by cbindgen from bindings/c/src.

#ifndef MOE_RUNNER_H
#define MOE_RUNNER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Rises when something in this header is no longer what it was. What is added does not raise it.
#define MOE_ABI_VERSION 1

// How a call ended. More may be added at the end.
typedef enum moe_status {
  // All is well.
  MOE_STATUS_OK = 0,
  // An argument does not fit: null, of the wrong size, a name or number that does not exist; hidden
  // states that are not finite.
  MOE_STATUS_ARGUMENT = 1,
  // A file could not be read.
  MOE_STATUS_IO = 2,
  // The checkpoint is wrong, incomplete, or of an architecture that is not known.
  MOE_STATUS_CHECKPOINT = 3,
  // A layer's description contradicts itself.
  MOE_STATUS_SPEC = 4,
  // No kernel can run this, or the named one cannot; the words give every reason.
  MOE_STATUS_NO_KERNEL = 5,
  // A bug of the library. The handle cannot be used any more, but for freeing it.
  MOE_STATUS_BUG = 6,
  // Anything else.
  MOE_STATUS_FAILED = 7,
} moe_status;

// Element types of rows and of weights.
typedef enum moe_dtype {
  // IEEE binary32.
  MOE_DTYPE_F32 = 0,
  // bfloat16.
  MOE_DTYPE_BF16 = 1,
  // IEEE binary16.
  MOE_DTYPE_F16 = 2,
} moe_dtype;

// How the rows of gate and up projection stand in one stack.
typedef enum moe_layout {
  // The gate's I rows, then those of the up projection.
  MOE_LAYOUT_HALVES = 0,
  // The up projection's I rows, then those of the gate.
  MOE_LAYOUT_UP_FIRST = 1,
  // By turns, the gate's first.
  MOE_LAYOUT_INTERLEAVED = 2,
  // There is no gate projection: I rows.
  MOE_LAYOUT_UP_ONLY = 3,
} moe_layout;

// A checkpoint that is open, with its MoE layers.
typedef struct moe_checkpoint moe_checkpoint;

// The routed experts of a layer, ready to run on rows that the caller has routed.
typedef struct moe_experts moe_experts;

// A layer of a checkpoint, ready to run.
typedef struct moe_layer moe_layer;

// Experts as two stacks of floats in the caller's memory.
typedef struct moe_stacked_experts {
  // sizeof(moe_stacked_experts).
  size_t size;
  // E, how many experts.
  size_t experts;
  // H, width of the rows.
  size_t hidden;
  // I, width between the two products.
  size_t intermediate;
  // The moe_dtype of both stacks.
  uint32_t dtype;
  // The moe_layout of gate_up.
  uint32_t layout;
  // Both stacks are stored [E, in, out] instead of [E, out, in].
  bool transposed;
  // Weights multiply the experts' input rows (Llama 4) instead of their output rows.
  bool weight_on_input;
  // [E, 2I, H]; [E, I, H] without a gate projection.
  const void *gate_up;
  // [E, H, I].
  const void *down;
  // [E, 2I] or [E, I], as the rows of gate_up; null: none. Copied.
  const float *gate_up_bias;
  // [E, H]; null: none. Copied.
  const float *down_bias;
  // The function between the products: "silu", "gelu", "gelu_tanh", "relu", "relu2",
  // "clamped_swiglu", "swiglu_step" or "situ".
  const char *activation;
  // Steepness of clamped_swiglu's sigmoid (gpt-oss: 1.702).
  float alpha;
  // Added to clamped_swiglu's up projection (gpt-oss: 1); situ's beta.
  float beta;
  // What clamped_swiglu and swiglu_step clamp to (gpt-oss: 7).
  float limit;
  // situ's lambda; 0: it has none.
  float lambda;
  // Handed to `release`.
  void *owner;
  // Called once, on any thread, when the stacks are needed no longer: as soon as they are packed,
  // unless the kernel reads them in place; at once where the call fails, but for a wrong size. Null:
  // they stay until the handle is freed.
  void (*release)(void *owner);
} moe_stacked_experts;

// What a pool calls, once for each item of a region. May be called on any thread, and never returns
// anything: what goes wrong is told when the region has ended.
typedef void (*moe_task)(const void *work, size_t item, size_t worker);

// Threads of the caller's own.
typedef struct moe_thread_pool {
  // Handed to `run`.
  void *context;
  // The most that take part in one region, at least 1.
  size_t threads;
  // Calls task(work, item, worker) once for every item < items, in any order, on any threads, and
  // returns when all calls have returned. Workers are numbered from 0 to threads - 1; no two calls
  // with one worker run at the same time. Regions of several handles may run at the same time.
  void (*run)(void *context, size_t items, moe_task task, const void *work);
} moe_thread_pool;

// How a layer or experts are to run. Zeros are defaults; a null pointer to options is all defaults.
typedef struct moe_options {
  // sizeof(moe_options).
  size_t size;
  // The moe_dtype of hidden states and outputs.
  uint32_t dtype;
  // Rows that hold NaN or infinities go through, and spoil no other row; else such rows are an error
  // that names row and column.
  bool non_finite;
  // Threads to run on; 0: the physical cores that this process may use. Handles with equally many
  // share them.
  size_t threads;
  // A kernel by name (moe_layer_explain lists them), used or refused; null: the first that can.
  const char *kernel;
  // Threads of the caller's own in place of `threads`; null: none. It is copied; its context must
  // stay until the handle is freed.
  const struct moe_thread_pool *pool;
} moe_options;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The MOE_ABI_VERSION of the library that is loaded.
uint32_t moe_abi_version(void);

// The library's own version, such as "0.1.0".
const char *moe_version(void);

// Why the last call on this thread that did not return MOE_STATUS_OK failed: one line of UTF-8. Valid
// until the next call on this thread fails.
const char *moe_last_error(void);

// Opens the checkpoint at `path` (UTF-8): a folder with config.json and *.safetensors, or a .gguf
// file. Headers are read; the files are mapped, and must not change while a handle made from this one
// is being made.
enum moe_status moe_checkpoint_open(const char *path,
                                    struct moe_checkpoint **checkpoint);

// Writes the numbers of the MoE layers, in order, the first `capacity` of them to `layers` (which may
// be null if `capacity` is 0), and to `count` how many there are.
enum moe_status moe_checkpoint_layers(const struct moe_checkpoint *checkpoint,
                                      size_t *layers,
                                      size_t capacity,
                                      size_t *count);

// Frees a checkpoint; null is ignored. What was made from it stays.
void moe_checkpoint_free(struct moe_checkpoint *checkpoint);

// Makes experts in the caller's memory ready to run. No stack is copied but into the order that the
// kernel reads. `options` may be null.
enum moe_status moe_experts_from_memory(const struct moe_stacked_experts *stacks,
                                        const struct moe_options *options,
                                        struct moe_experts **experts);

// Makes the routed experts of layer `layer` of a checkpoint ready to run, in the number format that
// they are stored in. `options` may be null.
enum moe_status moe_experts_open(const struct moe_checkpoint *checkpoint,
                                 size_t layer,
                                 const struct moe_options *options,
                                 struct moe_experts **experts);

// Writes the sum over j of weights[t, j] * expert(ids[t, j])(hidden[t]) for every row t of `output`
// [tokens, H]. `hidden` [tokens, H] and `output` have the dtype of the options, and must not overlap;
// `ids` and `weights` are [tokens, top_k] for any top_k; an id that is negative, or no expert's, adds
// nothing. After a failure `output` is unspecified.
enum moe_status moe_experts_forward(const struct moe_experts *experts,
                                    const void *hidden,
                                    size_t tokens,
                                    const int32_t *ids,
                                    const float *weights,
                                    size_t top_k,
                                    void *output);

// Which kernel runs the experts, and why no other: as moe_layer_explain.
const char *moe_experts_explain(const struct moe_experts *experts);

// Frees experts; null is ignored.
void moe_experts_free(struct moe_experts *experts);

// Makes layer `layer` of a checkpoint, by its number in the model, ready to run: chooses a kernel, and
// packs the weights for it. `options` may be null.
enum moe_status moe_layer_open(const struct moe_checkpoint *checkpoint,
                               size_t layer,
                               const struct moe_options *options,
                               struct moe_layer **opened);

// Width H of the layer's rows; 0 for null.
size_t moe_layer_hidden_size(const struct moe_layer *layer);

// Runs the layer: routes `hidden` [tokens, H], and writes `output` [tokens, H], both of the dtype of
// the options, which must not overlap. After a failure `output` is unspecified.
enum moe_status moe_layer_forward(const struct moe_layer *layer,
                                  const void *hidden,
                                  size_t tokens,
                                  void *output);

// The same with routing that was finished elsewhere: neither gate nor router runs. `ids` [tokens,
// top_k]: an id that is negative, or no expert's, adds nothing. `weights` [tokens, top_k]: what the
// experts' rows are multiplied by, with any factor of the router in them.
enum moe_status moe_layer_forward_routed(const struct moe_layer *layer,
                                         const void *hidden,
                                         size_t tokens,
                                         const int32_t *ids,
                                         const float *weights,
                                         size_t top_k,
                                         void *output);

// Which kernel runs the layer, and why no other: a JSON object with `dtype`, `chosen`, `why`, `able`
// and `rejected`. Valid until the layer is freed; null for null.
const char *moe_layer_explain(const struct moe_layer *layer);

// Frees a layer; null is ignored.
void moe_layer_free(struct moe_layer *layer);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* MOE_RUNNER_H */
