# What the environment may say to the compilers (CXXFLAGS, CUDAFLAGS, LDFLAGS, NVCC_APPEND_FLAGS, a CXX of several words).
#
# Flags that choose instructions or arithmetic are dropped, with a message: the kernels' instruction set is chosen where
# they run, so everything else must run anywhere, and the bytes of a sample must not depend on who built. All others
# (hardening, debugging, where things are) are kept; packagers need them. Dropped and not refused, since -march stands in
# every environment of conda's compilers; dropped and not countermanded by flags behind, since none takes back -mavx2 or
# --use_fast_math, and -ffast-math on a link line makes denormals zero in the whole process. CFLAGS and CPPFLAGS need
# nothing: CMake reads neither for C++.

# Of the host's compiler; of -m only what is about the calling convention and hardening is kept.
set(host_kept "^-m(32|64|abi|float-abi|macosx-version-min|branch-protection|(no-)?omit-leaf-frame-pointer)$")
string(CONCAT host_dropped "^(-m.+|-Ofast|-f(no-)?(fast-math|unsafe-math-optimizations|finite-math-only|"
  "associative-math|reciprocal-math|signed-zeros|trapping-math|rounding-math|signaling-nans|math-errno|honor-.+|"
  "approx-func|single-precision-constant|float-store|excess-precision|cx-.+|fp-.+))$")
# Of nvcc, with one dash or two; the architectures are FASTGEN_CUDA_ARCHITECTURES.
set(nvcc_valued "ftz|prec-div|prec-sqrt|fmad|arch|gpu-architecture|code|gpu-code|gencode|generate-code|maxrregcount")
set(nvcc_dropped "^--?(use_fast_math|extra-device-vectorization|${nvcc_valued})$")
# Those whose value may be a word of its own.
set(with_value "^(-Xcompiler|--compiler-options|-Xclang|-mllvm|--?(${nvcc_valued}))$")

# Drops flags from variables that hold them as one string; `name` is what the environment calls them.
function(fastgen_clean name variable)
  separate_arguments(words UNIX_COMMAND "${${variable}}")
  set(kept "")
  set(dropped "")
  while(words)
    list(POP_FRONT words flag)
    if(flag MATCHES "${with_value}" AND words)
      list(POP_FRONT words value)
      list(APPEND flag "${value}")
    endif()
    set(to kept)
    string(REGEX REPLACE "[=, ]" ";" parts "${flag}")
    foreach(part IN LISTS parts)
      if(part MATCHES "${nvcc_dropped}" OR (part MATCHES "${host_dropped}" AND NOT part MATCHES "${host_kept}"))
        set(to dropped)
      endif()
    endforeach()
    list(APPEND ${to} ${flag})
  endwhile()
  if(dropped)
    list(TRANSFORM kept REPLACE "([\\\\\" ])" "\\\\\\1")  # words again
    list(JOIN kept " " kept)
    list(JOIN dropped " " dropped)
    message(STATUS "${name}: dropped ${dropped} (instructions are chosen at run time, and arithmetic is fixed)")
    set(${variable} "${kept}" PARENT_SCOPE)
  endif()
endfunction()

# The same for a variable of the environment: for what CMake runs from here on.
function(fastgen_clean_environment name)
  set(value "$ENV{${name}}")
  fastgen_clean(${name} value)
  set(ENV{${name}} "${value}")
endfunction()
