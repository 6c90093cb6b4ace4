// WKV6 backward of whole sequences, chunk by chunk: wkv_backward_chunk.h has the formulas.
//
// The states before all segments are the checkpoints. Where the forward has not kept them, the
// backward first runs through the sequence to find them. Then, segment by segment from the last to
// the first, it recomputes the state before each chunk and goes through the chunks in reverse. S and
// G are stored transposed, with the values as rows. The heads are processed in turn, chunk by chunk,
// because their rows are neighbours in memory.
//
// Included by isa.inc inside the namespace of one instruction set.

constexpr int64_t kSegment = kCheckpointTokens;
constexpr int64_t kBackwardHeads = 2;  // whose states of a segment fit in the second-level cache
// Bytes of recomputed checkpoints of the heads that are processed in turn, unless kBackwardHeads
// need more.
constexpr int64_t kCheckpoints = int64_t(1) << 24;
// Gradients of as many bytes have left the caches before anybody reads them.
constexpr int64_t kStreamed = int64_t(1) << 23;

// One thread's working memory.
template <class T>
struct BackwardScratch {
  BackwardChunk<T> chunk;
  Prefetcher prefetcher;
  alignas(64) T row[kMaxHeadSize];  // a row of a gradient that is written past the caches
  T* G_rows;                        // [keys, values]
  T* G;                             // [heads, values, keys]
  T* running_states;                // [heads, values, keys]: the state between two checkpoints
  T* states;       // [kBackwardHeads, kSegment / C, values, keys]: before the chunks of a segment
  T* checkpoints;  // [heads, 1 or segments, values, keys]: before this segment, or before each
};

// One sequence, heads [first, last), the values of one part.
template <class T, class Length>
struct SequenceBackward {
  static constexpr int C = BackwardChunk<T>::C;
  static constexpr int64_t kChunks = kSegment / C;
  const BackwardWork& job;
  const int64_t index, first, last, part_index;
  const Columns part;
  const Length keys, values;
  const bool streamed;  // gradients are written past the caches
  BackwardScratch<T>& scratch;
  const Sequence& sequence = job.list[index];
  const int64_t chunks = (sequence.length + C - 1) / C;
  const int64_t segments = (chunks + kChunks - 1) / kChunks;
  const bool given = job.checkpoints.data;

  T* G(int64_t h) const { return scratch.G + (h - first) * values * keys; }
  // The state before a chunk: a checkpoint, or one of the states of the current segment.
  T* state(int64_t h, int64_t chunk) const {
    const int64_t segment = chunk / kChunks, n = chunk % kChunks;
    if (n == 0) {
      const int64_t row = given ? h - first : (h - first) * segments + segment;
      return scratch.checkpoints + row * values * keys;
    }
    return scratch.states + ((h - first) % kBackwardHeads * kChunks + n) * values * keys;
  }
  T* grad_u(int64_t h) const {
    return static_cast<T*>(job.grad_u_terms) +
           ((index * job.parts + part_index) * job.H + h) * job.N;
  }
  int64_t tokens(int64_t chunk) const {
    return sequence.length - chunk * C < C ? sequence.length - chunk * C : C;
  }
  char* row(const Tokens& x, int64_t h, int64_t chunk) const {
    return x.row(sequence.b, sequence.begin + chunk * C, h);
  }

  // Where the length is fixed there is one part, and no padding.
  int64_t width(Columns columns) const {
    return std::is_same_v<Length, int64_t> ? columns.last - columns.first : int64_t(keys);
  }

  // The chunk's rows in the accumulator's dtype, zeros after its last token.
  RWKV6_OUTLINE void load(const Tokens& x, int64_t h, int64_t chunk, Columns columns,
                          typename BackwardChunk<T>::Rows& rows) const {
    const char* from = row(x, h, chunk);
    if (from) from += columns.first * size_of(x.dtype);
    const int64_t count = tokens(chunk);
    for (int64_t t = 0; t < C; t++) {
      load_row(t < count ? from : nullptr, x.dtype, width(columns), rows.row[t]);
      if (from) from += x.distance(1, 0);
    }
  }

  RWKV6_OUTLINE void store(const typename BackwardChunk<T>::Rows& rows, const Tokens& x, int64_t h,
                           int64_t chunk, Columns columns, int64_t offset) const {
    char* to = row(x, h, chunk) + (columns.first + offset) * size_of(x.dtype);
    for (int64_t t = 0; t < tokens(chunk); t++, to += x.distance(1, 0)) {
      if (!streamed) {
        store_row(rows.row[t], width(columns), x.dtype, to);
        continue;
      }
      store_row(rows.row[t], width(columns), x.dtype, scratch.row);
      stream_lines(scratch.row, width(columns) * size_of(x.dtype), to);
    }
  }

  // Prefetches the rows that come after those of head h and `chunk`: the same chunk's of the next
  // of the heads [from, to), or after the last head the first one's of next_chunk.
  void prefetch(std::initializer_list<const Tokens*> tensors, int64_t h, int64_t chunk,
                int64_t from, int64_t to, int64_t next_chunk) const {
    scratch.prefetcher.clear();
    const bool same_chunk = h + 1 < to;
    for (const Tokens* x : tensors)
      scratch.prefetcher.want(
          *x, row(*x, same_chunk ? h + 1 : from, same_chunk ? chunk : next_chunk), C, job.N);
  }

  // From the state S before a chunk to that after it.
  RWKV6_OUTLINE void recompute_state(int64_t h, int64_t chunk, const T* S, T* to) const {
    typedef Vec<T> V;
    BackwardChunk<T>& c = scratch.chunk;
    load(job.w, h, chunk, {0, job.N}, c.all);
    load(job.k, h, chunk, {0, job.N}, c.K);
    load(job.v, h, chunk, part, c.v);
    backward_decays(keys, tokens(chunk), c);
    for (int64_t i = 0; i < keys; i += V::W) {
      V all(T(1));
      for (int t = C - 1; t >= 0; t--) {
        (V::load(c.K.row[t] + i) * all).store(c.K.row[t] + i);
        all = all * V::load(c.all.row[t] + i);
      }
    }
    update<C>(values, keys, c.kPitch, c.decay, c.decay_low, c.v.row[0], c.K.row[0], S, to,
              scratch.prefetcher);
  }

  // The gradients of one chunk of one head.
  void backward_pass(int64_t h, int64_t chunk) const {
    BackwardChunk<T>& c = scratch.chunk;
    const Columns all = {0, job.N};
    const bool from_y = job.grad_y.data;  // otherwise r and u play no part
    load(from_y ? job.r : job.grad_y, h, chunk, all, c.R);
    load(job.k, h, chunk, all, c.K);
    load(job.w, h, chunk, all, c.all);
    load(job.v, h, chunk, part, c.v);
    load(job.grad_y, h, chunk, part, c.grad_y);
    load_row(from_y ? job.u.row(h, sequence.b) : nullptr, job.u.dtype, job.N, c.u);
    load_row(grad_u(h), DTypeOf<T>::value, job.N, c.grad_u);
    backward_decays(keys, tokens(chunk), c);
    const bool state_matters = job.grad_final.data || chunk + 1 < chunks;
    backward_chunk(keys, values, tokens(chunk), state_matters, c, state(h, chunk), G(h),
                   scratch.G_rows, scratch.prefetcher);
    if (!from_y) memset(&c.grad_r, 0, sizeof c.grad_r);
    const int64_t offset = part_index * job.part_stride;
    store(c.grad_r, job.grad_r, h, chunk, all, offset);
    store(c.grad_k, job.grad_k, h, chunk, all, offset);
    store(c.q, job.grad_w, h, chunk, all, offset);
    store(c.grad_v, job.grad_v, h, chunk, part, 0);
    if (from_y) memcpy(grad_u(h), c.grad_u, sizeof(T) * size_t(job.N));
  }

  // The part's columns of a [key][value] matrix, transposed: out [values, keys].
  RWKV6_OUTLINE void load_state(const char* matrix, const States& states, T* out) const {
    T* rows = scratch.G_rows;
    memset(rows, 0, sizeof(T) * size_t(keys * values));
    for (int64_t i = 0; matrix && i < job.N; i++)
      load_row(matrix + (i * states.stride_row + part.first) * size_of(states.dtype), states.dtype,
               part.last - part.first, rows + i * values);
    transpose(keys, values, rows, out);
  }

  RWKV6_OUTLINE void store_state(const T* transposed, const States& states, char* matrix) const {
    T* rows = scratch.G_rows;
    transpose(values, keys, transposed, rows);
    for (int64_t i = 0; i < job.N; i++)
      store_row(rows + i * values, part.last - part.first, states.dtype,
                matrix + (i * states.stride_row + part.first) * size_of(states.dtype));
  }

  // The state before a segment, from where the caller has it.
  void load_start(int64_t h, int64_t segment) const {
    if (segment == 0) {
      load_state(sequence.initial < 0 ? nullptr : job.initial.matrix(sequence.initial, h),
                 job.initial, state(h, 0));
      return;
    }
    const int64_t row = job.sequences.checkpoint(sequence.b, sequence.begin, segment * kSegment);
    load_state(job.checkpoints.matrix(row, h), job.checkpoints, state(h, segment * kChunks));
  }

  void run() const {
    for (int64_t h = first; h < last; h++) {
      if (!given) load_start(h, 0);
      load_state(job.grad_final.matrix(index, h), job.grad_final, G(h));
      memset(grad_u(h), 0, sizeof(T) * size_t(job.N));
    }
    // Recomputes the checkpoints, up to the beginning of the last segment.
    for (int64_t n = 0; !given && n < (segments - 1) * kChunks; n++)
      for (int64_t h = first; h < last; h++) {
        prefetch({&job.w, &job.k, &job.v}, h, n, first, last, n + 1);
        T* running = scratch.running_states + (h - first) * values * keys;
        recompute_state(h, n, n % kChunks ? running : state(h, n),
                        (n + 1) % kChunks ? running : state(h, n + 1));
      }
    for (int64_t s = segments - 1; s >= 0; s--) {
      const int64_t begin = s * kChunks, end = begin + kChunks < chunks ? begin + kChunks : chunks;
      for (int64_t from = first; from < last; from += kBackwardHeads) {
        const int64_t to = from + kBackwardHeads < last ? from + kBackwardHeads : last;
        for (int64_t h = from; given && h < to; h++) load_start(h, s);
        for (int64_t n = begin; n + 1 < end; n++)
          for (int64_t h = from; h < to; h++) {
            prefetch({&job.w, &job.k, &job.v}, h, n, from, to, n + 1);
            recompute_state(h, n, state(h, n), state(h, n + 1));
          }
        for (int64_t n = end - 1; n >= begin; n--)
          for (int64_t h = from; h < to; h++) {
            if (streamed)
              prefetch({&job.r, &job.k, &job.v, &job.w, &job.grad_y}, h, n, from, to, n - 1);
            else
              prefetch({&job.r, &job.k, &job.v, &job.w, &job.grad_y, &job.grad_r, &job.grad_k,
                        &job.grad_v, &job.grad_w},
                       h, n, from, to, n - 1);
            backward_pass(h, n);
          }
      }
    }
    for (int64_t h = first; h < last && job.grad_initial.data; h++)
      store_state(G(h), job.grad_initial, job.grad_initial.matrix(index, h));
  }
};

// Whether the gradients are large enough to be written past the caches, and are whole cache lines.
inline bool is_streamed(const BackwardWork& job) {
  int64_t tokens = 0, bytes = 0;
  for (int64_t s = 0; s < job.sequences.count; s++) tokens += job.list[s].length;
  bool lines = job.parts == 1;
  for (const Tokens* x : {&job.grad_r, &job.grad_k, &job.grad_v, &job.grad_w}) {
    const int64_t size = size_of(x->dtype);
    bytes += tokens * job.H * job.N * size;
    const int64_t distances = x->stride_b | x->stride_t | x->stride_h | job.N;
    lines = lines && reinterpret_cast<uintptr_t>(x->data) % 64 == 0 && distances * size % 64 == 0;
  }
  return lines && bytes >= kStreamed;
}

template <class T, class Length>
void backward_units(const BackwardWork& job, int64_t begin, int64_t end, Length keys) {
  const FlushDenormals flush;
  const int64_t units_per_sequence = job.H * job.parts;
  int64_t longest = 1;
  for (int64_t s = begin / units_per_sequence; s <= (end - 1) / units_per_sequence; s++)
    longest = job.list[s].length > longest ? job.list[s].length : longest;
  const int64_t segments = job.checkpoints.data ? 1 : (longest + kSegment - 1) / kSegment;
  const int64_t matrix = keys * keys;
  const int64_t affordable = kCheckpoints / (segments * matrix * int64_t(sizeof(T)));
  int64_t heads = affordable < kBackwardHeads ? kBackwardHeads : affordable;
  heads = heads < kHeadGroup ? heads : kHeadGroup;
  heads = heads < end - begin ? heads : end - begin;
  const int64_t states = kBackwardHeads * kSegment / kBackwardChunk;
  const bool streamed = is_streamed(job);
  const std::unique_ptr<BackwardScratch<T>> scratch(new BackwardScratch<T>);
  Scratch<T> memory((1 + 2 * heads + states + heads * segments) * Scratch<T>::aligned(matrix));
  scratch->G_rows = memory.take(matrix);
  scratch->G = memory.take(heads * matrix);
  scratch->running_states = memory.take(heads * matrix);
  scratch->states = memory.take(states * matrix);
  scratch->checkpoints = memory.take(heads * segments * matrix);
  while (begin < end) {
    const int64_t index = begin / units_per_sequence, unit = begin % units_per_sequence;
    const int64_t h = unit / job.parts, part = unit % job.parts;
    int64_t count = 1;
    if (job.parts == 1) {
      count = job.H - h < heads ? job.H - h : heads;
      count = end - begin < count ? end - begin : count;
    }
    const Columns columns = columns_of(part, job.parts, job.N, Vec<T>::W);
    const Length values(padded<T>(columns.last - columns.first));
    SequenceBackward<T, Length>{job,     index, h,      h + count, part,
                                columns, keys,  values, streamed,  *scratch}
        .run();
    begin += count;
  }
  if (streamed) finish_streams();
}

// A length that the compiler knows, constructed like an int64_t.
template <int64_t N>
struct Fixed : std::integral_constant<int64_t, N> {
  explicit Fixed(int64_t) {}
};

template <class T>
void backward(const BackwardWork& job, int64_t begin, int64_t end) {
  if (begin == end) return;
  if constexpr (sizeof(T) == 4) {
    if (job.parts == 1) switch (job.N) {
        case 32: return backward_units<T>(job, begin, end, Fixed<32>(32));
        case 64: return backward_units<T>(job, begin, end, Fixed<64>(64));
        case 128: return backward_units<T>(job, begin, end, Fixed<128>(128));
      }
  }
  backward_units<T>(job, begin, end, padded<T>(job.N));
}
