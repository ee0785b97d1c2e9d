# Installs the build that BUILD names, and builds c/examples against nothing but what was installed.
foreach(step
    "${CMAKE_COMMAND};--install;${BUILD};--prefix;${WORK}/installed"
    "${CMAKE_COMMAND};-S;${EXAMPLES};-B;${WORK}/build;-G;${GENERATOR};-DCMAKE_PREFIX_PATH=${WORK}/installed;-DCMAKE_BUILD_TYPE=Release"
    "${CMAKE_COMMAND};--build;${WORK}/build")
  execute_process(COMMAND ${step} COMMAND_ERROR_IS_FATAL ANY)
endforeach()
