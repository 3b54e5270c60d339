//! Functions compiled for instructions that the build does not take for granted.

/// `fn name(arguments) -> result = body;`: safe functions whose bodies are compiled for `$features`.
///
/// Only for the private functions of a file that hands out its table after it has seen that the
/// machine has all of these features.
macro_rules! compiled_for {
    ($features:literal: $(fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)? = $body:path;)*) => {$(
        fn $name($($arg: $type),*) $(-> $result)? {
            #[target_feature(enable = $features)]
            fn inner($($arg: $type),*) $(-> $result)? {
                $body($($arg),*)
            }
            // SAFETY: the machine has the features, or nobody could have come by the table.
            unsafe { inner($($arg),*) }
        }
    )*};
}
pub(super) use compiled_for;
