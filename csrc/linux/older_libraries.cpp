// What a recent g++ and its headers call, and older systems' libstdc++ and libc do not have. Defined
// here, and kept to ourselves by exports.map, it need not be there: the libraries then load wherever
// torch does. tests/test_package.py says which versions that makes them need.
#include <new>
#include <sstream>

#if defined(__GLIBCXX__)

// For the headers of torch and XLA, which write their errors to streams (GLIBCXX_3.4.26 and 3.4.29).
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;

// For containers that are asked for too many elements (GLIBCXX_3.4.29).
void std::__throw_bad_array_new_length() { throw std::bad_array_new_length(); }

#endif
#if defined(__GLIBC__)

// std::shared_ptr counts without atomic instructions while this is true (GLIBC_2.32).
extern "C" {
char __libc_single_threaded = 0;
}

#endif
