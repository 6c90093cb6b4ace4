// Sums in a fixed order: the gradients of what several sequences, or parts of one head, share.
// Included by isa.inc inside the namespace of one instruction set.

template <class T>
void sum(const SumJob& job, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  Scratch<T> scratch(Scratch<T>::aligned(job.N));
  T* total = scratch.take(job.N);
  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t s = unit / job.H, h = unit % job.H;
    for (int64_t i = 0; i < job.rows; i++) {
      for (int64_t j = 0; j < job.N; j++) total[j] = T(0);
      for (int64_t at = job.first[s]; at < job.first[s + 1]; at++) {
        const int64_t m = job.members[at];
        const T* term = static_cast<const T*>(job.terms) + ((m * job.H + h) * job.rows + i) * job.N;
        for (int64_t j = 0; j < job.N; j++) total[j] += term[j];
      }
      const int64_t offset = i * job.out.stride_row * size_of(job.out.dtype);
      store_row(total, job.N, job.out.dtype, job.out.matrix(s, h) + offset);
    }
  }
}
